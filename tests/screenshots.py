"""figure/report.png, the page of the demo as a browser shows it; and with --all_in, how it looks elsewhere.

make demo && python -m tests.screenshots
python -m tests.screenshots --page PATH --all_in DIR    # desktop, phone, light, dark, a query, the overview
"""

import argparse
from pathlib import Path

from tests.browser import CHROMIUM, DRIVER, NEEDED, browser

DEMO = "demo/wikitext_gpt2/influence_results/report.html"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=Path(DEMO), help=f"[{DEMO}]")
    parser.add_argument("--query", type=int, default=0, help="whose view is shown [0]")
    parser.add_argument("--figure", type=Path, default=Path("figure/report.png"), help="[figure/report.png]")
    parser.add_argument("--all_in", type=Path, help="a directory for all looks, in place of the figure")
    arguments = parser.parse_args()
    if not (CHROMIUM and DRIVER):
        raise SystemExit(f"error: this needs {NEEDED}")
    if not arguments.page.is_file():
        raise SystemExit(f"error: there is no {arguments.page}: make demo leaves it, or name another with --page")
    looks = {arguments.figure: ("desktop", "light", f"q{arguments.query}")}
    if arguments.all_in:
        arguments.all_in.mkdir(parents=True, exist_ok=True)
        looks = {
            arguments.all_in / f"{view}_{size}_{scheme}.png": (size, scheme, view)
            for view in (f"q{arguments.query}", "overview")
            for size in SIZES
            for scheme in ("light", "dark")
        }
    with browser() as window:
        for path, (size, scheme, view) in looks.items():
            window.resize(*SIZES[size])
            window.prefer(scheme)
            window.open(arguments.page, f"#/{view}")
            window.screenshot(path)
            print(path)


if __name__ == "__main__":
    main()
