"""The HTML of the report page: its frame, and its style for light and dark screens."""

from __future__ import annotations

__all__ = ["CSS", "PAGE"]

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$css</style>
</head>
<body>
<header>
<h1>Do more loops give better answers?</h1>
$lead
<p class="how">A recurrent-depth transformer encodes its input once, runs one shared block as many times
as asked, and decodes once. The number of loops is chosen when the model is used. This page shows
what they buy and what happens inside them.</p>
</header>
<nav aria-label="Contents"><h2>Contents</h2><ol>$contents</ol></nav>
<main>$sections</main>
<footer>$footer</footer>
</body>
</html>
"""

CSS = """
:root{--ink:#1f2933;--quiet:#52606d;--paper:#fff;--card:#f5f7fa;--line:#d5dbe1;--link:#0b62a4;
--mark:#f9d3bf}
@media (prefers-color-scheme:dark){:root{--ink:#e4e7eb;--quiet:#a3b0bd;--paper:#14191f;--card:#1e252d;
--line:#36424e;--link:#7cc0f5;--mark:#8a3d12}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1220px;padding:24px 28px 60px;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:2rem;line-height:1.2;margin:.6em 0 .7em}
h2{font-size:1.45rem;margin:2.2em 0 .5em;padding-top:.6em;border-top:1px solid var(--line)}
h3{font-size:1.12rem;margin:1.8em 0 .4em} h4{margin:0 0 .3em;font-size:.92rem;color:var(--quiet)}
p{max-width:78ch} a{color:var(--link)}
code,pre{font-family:ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;font-size:.88em}
.finding{background:var(--card);border-left:5px solid var(--line);border-radius:6px;padding:12px 20px;
margin:0 0 14px}
.finding.good{border-left-color:#009e73}
.finding p{margin:.25em 0;max-width:none} .big{font-size:1.22rem;font-weight:600;line-height:1.4}
.how{color:var(--quiet)}
nav{margin-top:1.5em} nav h2{font-size:1rem;border:0;margin:0;padding:0} nav>ol{margin:.3em 0;
padding-left:1.3em}
nav ol ol{list-style:none;display:flex;flex-wrap:wrap;gap:0 1.1em;padding:0;margin:0 0 .4em;
font-size:.92rem}
.facts{display:flex;flex-wrap:wrap;gap:8px 28px;margin:.8em 0 1.4em} .facts dt{font-size:.8rem;
color:var(--quiet)}
.facts dd{margin:0}
.figures{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:22px;align-items:start;
grid-auto-flow:dense}
figure{margin:0;scroll-margin-top:12px} figure.wide{grid-column:1/-1}
figure img{display:block;width:100%;height:auto;background:#fff;border:1px solid var(--line);
border-radius:6px;
padding:10px}
figcaption{font-size:.9rem;color:var(--quiet);padding:8px 4px 0}
.made{display:block;font-size:.8rem;opacity:.85;margin-top:3px}
details{margin:.4em 0} summary{cursor:pointer;color:var(--link)} .scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;margin:.4em 0} td,th{padding:3px 10px 3px 0;
text-align:right}
th{font-weight:600} th[scope=row]{text-align:left;white-space:nowrap}
tr+tr{border-top:1px solid var(--line)}
.answers td{text-align:left;font-family:ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;
white-space:nowrap;
letter-spacing:.06em}
mark{background:var(--mark);color:inherit;border-radius:2px}
.samples{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:16px;margin:0 0 18px}
pre{background:var(--card);border-radius:6px;padding:10px 12px;margin:0;white-space:pre-wrap;
overflow-wrap:anywhere}
footer{margin-top:3em;border-top:1px solid var(--line);font-size:.85rem;color:var(--quiet)}
footer p{max-width:none}
@media (max-width:880px){.figures,.samples{grid-template-columns:minmax(0,1fr)} body{padding:16px}}
@media print{details{display:block} nav{display:none}}
"""
