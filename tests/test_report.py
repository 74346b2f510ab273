"""What the page says: values that sum, texts that fit, duplicates, layers, experiments; untrusted text only as text."""

import dataclasses
import html
import json
import re

import numpy as np
import pytest
import torch

from influence_core.report.charts import figure, histogram
from influence_core.report.codes import decode_lengths, decode_values, encode_lengths, encode_values
from influence_core.report.duplicates import NEAR, same_tokens, shared_words
from influence_core.report.layers import by_depth, by_kind
from influence_core.report.page import FLAG, PAGE_BYTES, Draft, write_page
from influence_core.report.render import render
from influence_core.report.texts import visible_pieces
from influence_core.scores.parts import SHOWN_EACH
from influence_core.text import visible
from tests.report_pages import LAYERS, TextTask, made_up

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "seven", "wizards", "box", "five"]
NASTY = "<script>alert(1)</script> <img src=x onerror=alert(2)> &amp; &lt &#0; </script><!-- "
NASTY += "\u2028 \x1b[31m \u202e {{ 7*7 }}"


def texts(number, length=12, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, length)) for _ in range(number)]


@pytest.fixture(scope="module")
def page_of():
    """Makes the HTML of a page, and its data."""

    def make(queries, train, task=None, **options):
        task = task or TextTask()
        analysed = made_up(task, queries, train, **options)
        draft = Draft(task, queries, train, analysed, len(queries))
        text = render(draft.page())
        (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
        return text, json.loads(data), analysed

    return make


# ----------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("count", [1, 2, 3, 4, 100])
def test_values_come_back(count):
    """Within what codes.py says, on either side of zero; and all zeros."""
    values = np.random.default_rng(count).standard_normal(count) * 7e5
    back = decode_values(encode_values(values), count)
    shares = np.abs(values) / np.abs(values).max()
    assert np.all(
        np.abs(back - values) <= np.where(shares > 0.1, 0.02, 0.06) * np.abs(values) + 1e-4 * np.abs(values).max()
    )
    assert decode_values(encode_values(np.zeros(count)), count).tolist() == [0] * count


@pytest.mark.parametrize("lengths", [[], [0], [17, 18, 19], [36, 400, 1, 2, 3], list(range(60))])
def test_lengths_come_back(lengths):
    assert decode_lengths(encode_lengths(lengths)) == lengths


def test_codes_need_no_escape():
    """Neither JSON nor HTML changes them."""
    coded = encode_lengths(range(2000)) + encode_values(np.linspace(-1, 1, 999))[1]
    assert json.dumps(coded)[1:-1] == coded == html.escape(coded)


def test_values_of_a_pair_sum_to_its_score(page_of):
    """Both sides and the layers, as page.js would add them up: tokens, what is left out, what has no position."""
    queries, train = texts(3), texts(30, seed=1)
    _, data, analysed = page_of(queries, train)
    depths, task = len(data["depths"]), TextTask()
    assert len(data["pairs"]) == 3 * 2 * SHOWN_EACH
    for (query, index), pair, score in zip(analysed.parts.pairs, data["pairs"], data["scores"]):
        assert score == pytest.approx(analysed.scores[query, index], rel=1e-5)
        for side, lengths in zip(pair, (data["examples"][str(index)], data["queries"][query])):
            values = decode_values(side[:2], sum(len(decode_lengths(row)) for row in lengths))
            size = np.abs(values).sum()
            assert values.sum() + side[2] == pytest.approx(score, abs=0.01 * size)
        count = len(task.token_rows(train[index])["input_ids"][0])
        expected = analysed.parts.train_tokens[analysed.parts.pairs.index((query, index))][:count].numpy()
        assert decode_values(pair[0][:2], count) == pytest.approx(expected, abs=0.02 * float(np.abs(expected).max()))
        layers = decode_values(pair[2], depths + len(data["kinds"]))
        assert layers[:depths].sum() == pytest.approx(score, abs=0.02 * np.abs(layers).sum())
        assert layers[depths:].sum() == pytest.approx(score, abs=0.02 * np.abs(layers).sum())


def test_the_highest_and_the_lowest(page_of):
    """In their order, with rank, score and index; where there are few, each once."""
    for num_train in (1, 7, 20, 40):
        text, _, analysed = page_of(texts(2), texts(num_train, seed=1))
        articles = re.findall(r'<article class="query".*?</article>', text, re.DOTALL)
        for article, row in zip(articles, analysed.scores):
            shown = re.findall(r'data-example="(\d+)">\n<summary><span class="rank">(\d+)</span> <b>(.*?)</b>', article)
            order = np.argsort(-row).tolist()
            num_top = min(SHOWN_EACH, -(-num_train // 2))
            bottom = order[num_top:][-SHOWN_EACH:][::-1]
            assert [int(index) for index, _, _ in shown] == [*order[:num_top], *bottom]
            for index, rank, score in shown:
                assert order[int(rank) - 1] == int(index) and score == figure(float(row[int(index)]))


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (346922.875, "+346,900"), (-26.56, "−26.56"), (1e9, "+1.000e+09"), (-1e-5, "−1.000e−05"), (0.5, "+0.5"),
     (999.96, "+1,000"), (12345678, "+12,350,000")],
)  # fmt: skip
def test_figures(value, said):
    assert figure(value) == said


def test_histogram_holds_all_scores():
    """Each is in a bin; marks lie where their scores are; all equal scores make one."""
    scores = np.random.default_rng(0).standard_normal(500)
    chart = histogram("title", scores, [(int(scores.argmax()), True), (int(scores.argmin()), False)])
    assert sum(int(each.said.split()[0]) for each in chart.bins) == 500
    assert chart.marks[0].x == 640 and chart.marks[1].x == 0 and 0 < chart.zero < 640
    assert len(histogram("title", np.ones(5)).bins) == 1


# -------------------------------------------------------------------------------------------------------------- text


def test_nothing_of_a_text_is_markup(page_of):
    """What would act is escaped or made visible wherever it comes: in texts, titles, topics, origins, names."""
    task = TextTask(titles=[NASTY])
    task.topic, task.origin = lambda example: NASTY + "\ud800", lambda split, index: NASTY
    text, data, _ = page_of([[NASTY]], [[NASTY], ["b"]], task, name=NASTY)
    assert text.count("<script") == 2 and text.count("</script") == 2 and "<img" not in text and "<!--" not in text
    for character in ("\x1b", "\u202e", "\ud800"):
        assert character not in text
    assert r"\x1b[31m" in text and "{{ 7*7 }}" in text
    rows = [html.unescape(row) for row in re.findall(r'<p class="tokens" dir="auto">(.*?)</p>', text, re.DOTALL)]
    assert any("<script>alert(1)</script>" in row for row in rows)
    for row, lengths in zip(rows[:1], data["queries"][0]):  # pieces cut the text exactly where it is to be cut
        assert sum(decode_lengths(lengths)) == len(row.encode("utf-16-le")) // 2


@pytest.mark.parametrize("text", [NASTY, "a\u200db 👩\u200d👧 \\x1b \x1b\\ \ud800 می\u200cخواهم ", "\x00" * 5, ""])
def test_pieces_of_visible_text(text):
    """However a text is cut, its pieces joined are what is visible of the whole."""
    for size in (1, 2, 3, 100):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        shown = visible_pieces(pieces)
        assert len(shown) == len(pieces) and "".join(shown) == visible(text)


def test_data_holds_no_text(page_of):
    _, data, _ = page_of(["needle haystack"], ["needle again", "x"])
    assert "needle" not in json.dumps(data)


def test_the_policy_allows_its_own_script_alone(page_of):
    text, _, _ = page_of(["a b"], ["c d"])
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', text)
    policy = html.unescape(policy)
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", text) and " style=" not in text


def test_the_same_inputs_give_the_same_bytes(page_of):
    def without_date(text):
        return re.sub(r"<p>Written .*?</p>", "", text)

    first, second = (page_of(texts(3), texts(30, seed=1))[0] for _ in range(2))
    assert without_date(first) == without_date(second) and first.count("<p>Written ") == 1


def test_without_parts(page_of):
    """Texts are shown, and the flag that shades them."""
    text, data, _ = page_of(texts(2), texts(30, seed=1), has_parts=False)
    assert FLAG in text and all(pair == [0, 0, 0] for pair in data["pairs"]) and texts(2)[0] in text
    assert FLAG not in page_of(texts(2), texts(30, seed=1))[0]


def test_a_task_that_knows_no_tokens(page_of):
    """Its examples are shown as it describes them."""
    task = TextTask()
    task.token_rows = lambda example: {}
    queries, train = texts(2), texts(25, seed=1)
    analysed = made_up(TextTask(), queries, train, has_parts=False)
    assert queries[1] in render(Draft(task, queries, train, analysed, 2).page())


def test_too_long_a_page_leaves_tokens_out(tmp_path, monkeypatch):
    """It stays below its limit; around the strongest token, with how many are left out and what they add up to."""
    monkeypatch.setattr("influence_core.report.page.PAGE_BYTES", 160_000)
    task, queries, train = TextTask(), texts(3, 300), texts(40, 300, seed=1)
    analysed = made_up(task, queries, train)
    for values in analysed.parts.train_tokens:
        values[700] = 1e6
    write_page(tmp_path / "page.html", task, queries, train, analysed, 3, {})
    text = (tmp_path / "page.html").read_text()
    assert len(text.encode()) <= 160_000
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    data = json.loads(data)
    for (query, index), pair in zip(analysed.parts.pairs, data["pairs"]):
        ((strongest, codes, rest, (left_out,)), row) = pair[0], analysed.parts.pairs.index((query, index))
        (shown,) = map(decode_lengths, data["examples"][str(index)])
        values = analysed.parts.train_tokens[row].double()
        assert strongest == pytest.approx(1e6, rel=1e-3) and len(shown) < len(values) - 1
        total = decode_values([strongest, codes], len(shown)).sum() + left_out + rest
        assert total == pytest.approx(float(values.sum()), rel=0.02)
        article = text[text.index(f'<article id="t{index}">') :]
        article = article[: article.index("</article>")]
        cut = sum(map(int, re.findall(r"(\d+) tokens (?:before|after) are left out", article)))
        assert cut + len(shown) == len(values) - 1


@pytest.mark.slow
def test_fifty_queries_with_twenty_long_examples(tmp_path):
    """The page that the limit is for, where no example is shown twice."""
    task, queries, train = TextTask(), texts(50, 170), texts(1000, 170, seed=1)
    scores = np.zeros((50, 1000), dtype=np.float32)
    for query in range(50):
        scores[query, 20 * query : 20 * query + 10], scores[query, 20 * query + 10 : 20 * query + 20] = 1, -1
    analysed = made_up(task, queries, train, scores=scores)
    write_page(tmp_path / "page.html", task, queries, train, analysed, 50, {})
    size = (tmp_path / "page.html").stat().st_size
    assert 0.8 * PAGE_BYTES < size <= PAGE_BYTES


# -------------------------------------------------------------------------------------------------------- duplicates


def test_duplicates_are_flagged(page_of):
    """The query itself, a passage that holds half of it, and not what shares a few words."""
    words = texts(1, 40)[0].split()
    near = " ".join([*words[:30], *["something", "else", "entirely", "stands", "here", "at", "its", "end", "now"]])
    far = " ".join([*words[:12], *(f"other{number}" for number in range(30))])
    text, _, _ = page_of([" ".join(words)], [" ".join(words), near, far])
    flags = dict(re.findall(r'data-example="(\d)">(?:(?!</details>).)*?class="flag">(.*?)<', text, re.DOTALL))
    assert flags["0"] == html.escape("duplicate: the query's own tokens").replace("&#x27;", "&#39;")
    assert flags["1"].startswith("near-duplicate: 7") and "2" not in flags


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [("a b c d e f", "A, b. c d e f!", 1), ("a b c d e f", "x a b c d e y", 0.5), ("a b c", "a b c", 1),
     ("a b c", "a b d", 0), ("", "", 0), ("a b c d e f g h", "p q r s t u", 0)],
)  # fmt: skip
def test_shared_words(one, other, share):
    """Of 5-grams of words, counted by hand; of a text in a longer one all are shared."""
    assert shared_words(one, other) == shared_words(other, one) == share
    assert 0 < NEAR < 1


def test_same_tokens():
    one = {"a": [[1, 2]], "b": [torch.tensor([3])]}
    assert same_tokens(one, {"a": [np.array([1, 2])], "b": [[3]]}) and not same_tokens({}, {})
    assert not same_tokens(one, {"a": [[1, 2]], "b": [[4]]}) and not same_tokens(one, {"a": [[1, 2]]})


# ------------------------------------------------------------------------------------------------------------ layers


def test_layers_by_depth_and_kind():
    """By the numbers in their labels, whatever the architecture; sums are kept."""
    depth, kind = by_depth(LAYERS), by_kind(LAYERS)
    assert depth.names == ["wte", "h.0", "h.1"] and depth.of_layer == [0, 1, 1, 2, 2]
    assert kind.names == ["wte", "h.attn.c_attn", "h.mlp.c_fc"] and kind.of_layer == [0, 1, 2, 1, 2]
    assert depth.sums(np.array([[1.0, 2, 3, 4, 5]])).tolist() == [[1, 5, 9]]
    t5 = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.1.EncDecAttention.q"]
    assert by_depth(t5).names == ["encoder.block.0", "decoder.block.0"]
    assert by_kind(["first", "second"]).names == ["first", "second"] and by_kind([]).names == []


# ---------------------------------------------------------------------------------------------------------- overview


def lds(**changes):
    row = {
        "lds": 0.5,
        "interval": [0.4, 0.6],
        "median": 0.5,
        "min": 0.1,
        "max": 0.8,
        "num_significant": 3,
        "per_query": [],
    }
    settings = {"scores": {"ekfac": {"model": "m", "train_dataset": "t", "damping": 0.1}, "tfidf": {}}}
    result = {"num_queries": 4, "num_subsets": 10, "num_repeats": 2, "methods": {"ekfac": row, "tfidf": row}}
    return result | {"ceiling": 0.9, "differences": {}, "calibration": {}, "settings": settings} | changes


COUNTERFACTUAL = {
    "num_queries": 4, "num_train": 30, "num_repeats": 2, "removal_sizes": [0, 5, 10],
    "metrics": {"mean query perplexity": {"ekfac": {"mean": [10, 12, 15], "standard_error": [0.1, None, 0.2]},
                                          "random": {"mean": [10, 10, 10], "standard_error": [None] * 3}}},
    "settings": {"scores": {"ekfac": {"model": "m", "train_dataset": "t", "damping": 0.1}}},
}  # fmt: skip


@pytest.mark.parametrize("values", [[3e5], [1962, 1962.001], [0, 1e-45], [3.4e38, -3.4e38], [0, 0], [7, 7]])
def test_scores_that_hardly_differ_have_a_histogram(values):
    found = histogram("all", np.float32(values), [(0, True)])
    assert found.bins and all(0 <= mark.x <= 1000 for mark in found.marks)


def test_experiments_are_shown_where_they_are(page_of):
    results = {"lds": lds(), "counterfactual": COUNTERFACTUAL}
    text, _, _ = page_of(texts(2), texts(30, seed=1), results=results)
    assert "0.400 to 0.600" in text and "15 ± 0.2" in text and "polyline" in text
    assert "(LDS)" not in page_of(texts(2), texts(30, seed=1))[0]


@pytest.mark.parametrize("result", [{}, {"methods": 3}, lds(methods={"a": {}}), lds(ceiling="x", methods=[])])
def test_a_result_that_is_none_of_ours_breaks_nothing(page_of, result):
    text, _, _ = page_of(texts(2), texts(30, seed=1), results={"lds": result})
    assert "read: it is of another version" in text


def test_a_result_of_other_data_is_told(page_of):
    same = {"model": "m", "train_dataset": "t", "damping": 0.1}
    for change in ({"train_dataset": "another"}, {"model": "another"}, {"damping": 0.2}):
        other = lds(settings={"scores": {"ekfac": same | change}})
        text, _, _ = page_of(texts(2), texts(30, seed=1), results={"lds": other})
        assert "or other data than these" in text and "0.400 to 0.600" not in text


def test_the_most_influential_over_all_queries(page_of):
    """By sum and by count, over all queries, also those that the page does not show."""
    queries, train = texts(12), texts(30, seed=1)
    analysed = made_up(TextTask(), queries, train)
    analysed.scores[:, 17] = 1e5
    own = np.zeros(30)
    own[3] = 50
    analysed = dataclasses.replace(analysed, self_influence=own)
    page = Draft(TextTask(), queries, train, analysed, 2).page()
    by_sum, by_count, of_self = page.sections[:3]
    assert by_sum.examples[0].index == by_count.examples[0].index == 17
    assert by_sum.examples[0].figures == "sum +1,200,000, among the top 10 of 12 queries"
    assert by_sum.examples[0].queries == [0, 1]
    assert of_self.examples[0].index == 3 and len(page.queries) == 2
