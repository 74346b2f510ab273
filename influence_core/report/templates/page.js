"use strict";
// Draws an example's tokens when it is opened, and moves between queries. Text is set as text alone, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const base = data.alphabet.length;
  const digit = new Map([...data.alphabet].map((letter, number) => [letter, number]));
  const find = (selector, inside = document) => inside.querySelector(selector);
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // ------------------------------------------------------------------------------------------------- numbers

  // The digits that codes.py packed, three of them in so many letters.
  const unpack = (codes, wide, letters) => {
    const digits = [];
    for (let at = 0; at < codes.length; at += letters) {
      let number = 0;
      for (let next = at; next < at + letters; next++) number = number * base + digit.get(codes[next]);
      digits.push(Math.floor(number / wide ** 2), Math.floor(number / wide) % wide, number % wide);
    }
    return digits;
  };

  const decodeValues = ([strongest, codes]) =>
    unpack(codes, 2 * data.steps + 1, 4).map((digit) => {
      const step = digit - data.steps;
      return strongest * Math.sign(step) * (step / data.steps) ** 2;
    });

  const decodeLengths = (codes) => {
    const lengths = [];
    let longer = 0;
    for (const part of unpack(codes, data.long + 1, 2)) {
      longer += part;
      if (part < data.long) {
        lengths.push(longer);
        longer = 0;
      }
    }
    return lengths;
  };

  const figure = (value) => {
    if (!value) return "0";
    const sign = value < 0 ? "−" : "+", size = Number(Math.abs(value).toPrecision(2));
    if (size < 1e-3 || size >= 1e8) return sign + size.toExponential(1).replace("-", "−");
    return sign + (size >= 1000 ? size.toLocaleString("en") : String(size));
  };
  // Of a score's size, so that the sign is the part's own.
  const percent = (value, score) => {
    const size = score ? Math.abs((100 * value) / score) : 0;
    const digits = size.toFixed(size < 9.95 ? 1 : 0);
    return Number(digits) ? `${value < 0 ? "−" : "+"}${digits} %` : "0 %";
  };

  // -------------------------------------------------------------------------------------------------- tokens

  const valueOf = new WeakMap(); // of a token: [value, share of the score]

  // One row of tokens, drawn where its text was.
  const drawTokens = (row, text, lengths, values, strongest, score) => {
    const tokens = document.createDocumentFragment();
    let at = 0;
    lengths.forEach((length, number) => {
      const piece = text.slice(at, (at += length));
      const value = values ? values[number] : 0;
      const token = make("span", "token", piece);
      if (values) {
        valueOf.set(token, [value, score]);
        token.tabIndex = -1;
        const weight = strongest ? Math.abs(value) / strongest : 0;
        if (weight > 0.004) {
          token.classList.add(value > 0 ? "pos" : "neg");
          token.style.setProperty("--weight", weight.toFixed(3));
          if (weight > 0.15 && !piece.trim()) token.classList.add(piece.includes("\n") ? "break" : "blank");
        }
      }
      tokens.append(token);
    });
    row.textContent = "";
    row.append(tokens);
    const first = find(".token", row);
    if (values && first) first.tabIndex = 0;
  };

  // All rows of an example: `side` is what queries.py calls one, or 0.
  const drawText = (box, lengths, side, score) => {
    const values = side ? decodeValues(side) : null;
    let at = 0;
    all(".segment", box).forEach((segment, number) => {
      const row = find(".tokens", segment);
      const ofRow = decodeLengths(lengths[number]);
      drawTokens(row, row.textContent, ofRow, values && values.slice(at, (at += ofRow.length)), side && side[0], score);
      const leftOut = find(".sum", segment);
      if (leftOut) leftOut.remove();
      if (side && find(".cut", segment)) segment.append(make("p", "cut sum", `what is left out adds ${figure(side[3][number])}`));
    });
    const rest = find(".rest", box);
    if (rest) rest.remove();
    if (side && side[2]) box.append(make("p", "rest", `Parts of the model that see no single token add ${figure(side[2])}.`));
  };

  const drawLayers = (coded, score) => {
    const values = decodeValues(coded);
    const box = make("div", "layers");
    let at = 0;
    for (const [title, names] of [["By layer", data.depths], ["By kind of layer", data.kinds]]) {
      const own = values.slice(at, (at += names.length));
      const lowest = Math.min(0, ...own), span = Math.max(0, ...own) - lowest || 1;
      const part = make("div");
      part.append(make("h4", "", title));
      names.forEach((name, number) => {
        const line = make("div", "layer");
        const rail = make("span", "rail");
        const bar = make("span", own[number] < 0 ? "neg" : "pos");
        bar.style.left = `${(100 * (Math.min(own[number], 0) - lowest)) / span}%`;
        bar.style.width = `${(100 * Math.abs(own[number])) / span}%`;
        rail.append(bar);
        line.append(make("span", "name", name), rail, make("span", "value", percent(own[number], score)));
        part.append(line);
      });
      box.append(part);
    }
    return box;
  };

  // ------------------------------------------------------------------------------------------------ examples

  const fill = (details) => {
    if (details.dataset.drawn) return;
    details.dataset.drawn = "yes";
    const index = details.dataset.example, body = find(".body", details);
    const source = document.getElementById(`t${index}`);
    const pair = details.dataset.pair === undefined ? null : data.pairs[details.dataset.pair];
    const score = pair && data.scores[details.dataset.pair];
    const text = make("div", "text");
    all(".segment", source).forEach((segment) => text.append(segment.cloneNode(true)));
    drawText(text, data.examples[index], pair && pair[0], score);
    body.textContent = "";
    body.append(text);
    if (pair && pair[2]) body.append(drawLayers(pair[2], score));
  };

  // The query's own tokens, by the part that each has in this pair's score.
  const shadeQuery = (details) => {
    const query = details.closest(".query");
    if (!query) return;
    const pair = data.pairs[details.dataset.pair], number = query.dataset.number;
    drawText(find(".text", query), data.queries[number], pair[1], data.scores[details.dataset.pair]);
    find(".shaded-by", query).textContent = pair[1]
      ? `Shade: the part of example ${details.dataset.example}’s score that comes from what the model computed at a token, for it and for what follows. Full colour: the strongest.` : "";
    all(".example.chosen", query).forEach((other) => other.classList.remove("chosen"));
    details.classList.add("chosen");
  };

  const choose = (details) => {
    all(".example[open]", details.parentElement).forEach((other) => {
      if (other !== details) other.open = false;
    });
    fill(details);
    shadeQuery(details);
    details.open = true;
  };

  document.addEventListener("toggle", (event) => {
    if (event.target.matches && event.target.matches(".example[open]")) choose(event.target);
  }, true);

  // ------------------------------------------------------------------------------------------------- queries

  const views = [find("#overview"), ...all(".query")];
  const links = all(".queries a");
  const entries = links.map((link) => link.parentElement);
  const texts = views.map((view, number) =>
    number ? [find("h2", view), ...all(".text .tokens", view)].map((row) => row.textContent).join("\n").toLowerCase() : "");
  let current = -1;

  const show = (number) => {
    if (number === current) return;
    current = number;
    views.forEach((view, other) => { view.hidden = other !== number; });
    links.forEach((link, other) => {
      if (other === number) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    });
    entries[number].scrollIntoView({ block: "nearest" });
    const first = find(".lists .example", views[number]);
    if (first && !find(".example.chosen", views[number])) choose(first);
    hideTip();
  };

  const narrow = window.matchMedia("(max-width: 46rem)");
  const go = (number) => {
    location.hash = `/${views[number].id}`; // no element's name, to which a browser would scroll by itself
    show(number);
    if (narrow.matches) views[number].scrollIntoView();
    else window.scrollTo(0, Math.min(window.scrollY, find(".frame").offsetTop));
  };
  const byHash = () => {
    const number = views.findIndex((view) => [`#/${view.id}`, `#${view.id}`].includes(location.hash));
    const unknown = number < 0 && /^#\/?q(\d+)$/.exec(location.hash);
    if (unknown) find("#found").textContent = `Query ${unknown[1]} is not on this page`;
    show(number >= 0 ? number : unknown ? 0 : Math.min(1, views.length - 1));
  };
  window.addEventListener("hashchange", byHash);

  const step = (by) => {
    let number = current + by;
    while (number >= 0 && number < views.length && entries[number].hidden) number += by;
    if (number >= 0 && number < views.length) go(number);
  };

  links.forEach((link, number) => link.addEventListener("click", (event) => {
    event.preventDefault();
    go(number);
  }));

  // The same query on the page of other scores.
  all(".others a").forEach((link) => link.addEventListener("click", () => { link.hash = location.hash; }));

  const stepExample = (by) => {
    const list = all(".example", views[current]);
    if (!list.length) return;
    const at = list.findIndex((each) => each.contains(document.activeElement));
    const from = at >= 0 ? at : list.findIndex((each) => each.open);
    const next = list[Math.min(Math.max(from + by, 0), list.length - 1)];
    choose(next);
    find("summary", next).focus();
    next.scrollIntoView({ block: "nearest" });
  };

  const search = find("#search");
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    entries.forEach((entry, number) => {
      entry.hidden = words.length > 0 && !(number && words.every((word) => texts[number].includes(word)));
      count += number && !entry.hidden ? 1 : 0;
    });
    find("#found").textContent = words.length ? `${count} of ${entries.length - 1} queries` : "";
  };
  search.addEventListener("input", filter);
  search.addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      const number = entries.findIndex((entry, which) => which && !entry.hidden);
      if (number > 0) go(number);
      find("#main").focus({ preventScroll: true });
    } else if (event.key === "Escape") {
      search.value = "";
      filter();
      find("#main").focus({ preventScroll: true });
    }
  });

  // ------------------------------------------------------------------------------------- values, and the keyboard

  const tip = find("#tip");
  const hideTip = () => { tip.hidden = true; };
  const showTip = (token) => {
    if (!valueOf.has(token)) return;
    const [value, score] = valueOf.get(token);
    tip.textContent = `${figure(value)}  ·  ${percent(value, score)} of the score`;
    tip.hidden = false;
    const box = token.getClientRects()[0] || token.getBoundingClientRect();
    const left = Math.min(Math.max(box.left, 4), document.documentElement.clientWidth - tip.offsetWidth - 4);
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = `${Math.max(left, 0)}px`;
    tip.style.top = `${above < 4 ? box.bottom + 6 : above}px`;
  };
  const isToken = (element) => element instanceof Element && element.classList.contains("token");
  document.addEventListener("mouseover", (event) => (isToken(event.target) ? showTip(event.target) : hideTip()));
  document.addEventListener("focusin", (event) => (isToken(event.target) ? showTip(event.target) : hideTip()));
  document.addEventListener("scroll", hideTip, true);

  const stepToken = (token, by) => {
    const other = by > 0 ? token.nextElementSibling : token.previousElementSibling;
    if (!isToken(other)) return;
    token.tabIndex = -1;
    other.tabIndex = 0;
    other.focus();
    showTip(other);
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target === search) return;
    const actions = {
      j: () => step(1),
      k: () => step(-1),
      ArrowDown: () => stepExample(1),
      ArrowUp: () => stepExample(-1),
      "/": () => { search.focus(); search.select(); },
      o: () => go(0),
      Escape: hideTip,
    };
    if (isToken(event.target)) {
      actions.ArrowRight = () => stepToken(event.target, 1);
      actions.ArrowLeft = () => stepToken(event.target, -1);
    } else {
      actions.ArrowRight = () => {
        const first = find(".example[open] .token[tabindex='0']", views[current]);
        if (first) first.focus();
      };
    }
    if (!Object.hasOwn(actions, event.key)) return;
    event.preventDefault();
    actions[event.key]();
  });

  document.documentElement.classList.add("js");
  byHash();
})();
