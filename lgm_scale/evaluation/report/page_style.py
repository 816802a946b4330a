"""Style and behaviour of the report's page: sortable tables, zoomable pictures, light and dark."""

from __future__ import annotations

from lgm_scale.evaluation.report.theme import DARK, LIGHT, Theme

__all__ = ["SCRIPT", "STYLE"]


def _variables(theme: Theme) -> str:
    names = ("page", "paper", "ink", "muted", "rule", "accent")
    return " ".join(f"--{name}: {getattr(theme, name)};" for name in names)


STYLE = f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink);
  font: 17px/1.6 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }}
main {{ max-width: 1120px; margin: 0 auto; padding: 48px 24px 72px; }}
h1 {{ font-size: 34px; line-height: 1.2; margin: 0 0 12px; }}
h2 {{ font-size: 23px; margin: 56px 0 10px; }}
p, li {{ max-width: 46em; }}
p {{ margin: 0 0 14px; }}
.lead {{ font-size: 19px; }}
.muted, figcaption {{ color: var(--muted); font-size: 15px; }}
figure {{ margin: 18px 0 0; background: var(--paper); border: 1px solid var(--rule);
  border-radius: 10px; padding: 12px; }}
figure img {{ display: block; width: 100%; height: auto; margin: 0 auto; cursor: zoom-in; }}
figcaption {{ border-top: 1px solid var(--rule); margin-top: 12px; padding: 10px 8px 2px; }}
details {{ margin-top: 18px; }}
summary {{ cursor: pointer; color: var(--accent); }}
.scroll {{ overflow-x: auto; background: var(--paper); border: 1px solid var(--rule);
  border-radius: 10px; margin-top: 18px; }}
table {{ border-collapse: collapse; width: 100%; font-size: 16px;
  font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: 10px 12px; white-space: nowrap; }}
thead th {{ font-size: 14px; font-weight: 600; line-height: 1.35; color: var(--muted);
  vertical-align: bottom; border-bottom: 2px solid var(--rule); }}
.sortable thead button {{ all: unset; cursor: pointer; }}
.sortable thead button:hover, .sortable thead button:focus-visible {{ color: var(--accent);
  text-decoration: underline; }}
.sortable th[aria-sort=ascending] button::after {{ content: " \\25B2"; }}
.sortable th[aria-sort=descending] button::after {{ content: " \\25BC"; }}
tbody tr + tr td, tbody tr + tr th {{ border-top: 1px solid var(--rule); }}
td.best {{ color: var(--accent); font-weight: 600; }}
.facts th {{ font-weight: 600; text-align: left; width: 14em; vertical-align: top; }}
.facts td {{ text-align: left; white-space: normal; overflow-wrap: anywhere; }}
pre {{ background: var(--paper); border: 1px solid var(--rule); border-radius: 10px;
  padding: 16px 18px; margin: 18px 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 14.5px/1.7 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }}
dialog {{ border: 0; padding: 0; background: var(--paper); max-width: 100vw; max-height: 100vh;
  width: 100vw; height: 100vh; overflow: auto; cursor: zoom-out; }}
dialog img {{ display: block; margin: auto; max-width: none; image-rendering: auto; }}
dialog::backdrop {{ background: rgba(0, 0, 0, .7); }}
"""

# Plain functions on what is in the page: nothing is loaded, and without scripts all is still shown.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const order = (a, b) => {
      const [x, y] = [Number(a), Number(b)];
      return a === "" || b === "" ? (a === "") - (b === "")
        : Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : (down ? y - x : x - y);
    };
    const rows = [...table.tBodies[0].rows].sort((a, b) => order(value(a), value(b)));
    table.tBodies[0].append(...rows);
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
  }));
}
const dialog = document.querySelector("dialog");
for (const image of document.querySelectorAll("figure img")) {
  image.tabIndex = 0;
  const open = () => {
    const large = dialog.querySelector("img");
    large.src = image.currentSrc || image.src;
    large.alt = image.alt;
    dialog.showModal();
  };
  image.addEventListener("click", open);
  image.addEventListener("keydown", event => { if (event.key === "Enter") open(); });
}
dialog.addEventListener("click", () => dialog.close());
"""
