"""The page around a report: its style, its script and the frame that forbids every outside request."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from typing import Any

__all__ = ["page"]


def page(title: str, body: str, points: Mapping[str, Any]) -> str:
    """A self-contained HTML page; ``title`` is text, ``body`` is HTML, ``points`` feed the hover read-out."""
    # The policy admits this script by its hash and nothing else: markup that slipped in could not run.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
<script type="application/json" id="points">{_json(points)}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _json(value: Mapping[str, Any]) -> str:
    # Inside a script element only "<" can end the data early; the rest is for readers that are stricter.
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


STYLE = """
:root{--paper:#faf9f6;--card:#fff;--ink:#1b1e23;--soft:#5d636d;--faint:#8b919b;--line:#e4e2dc;--grid:#edebe6;
--c0:#2456b8;--c1:#c2571a;--good:#23794a;--bad:#b3261e;--warn:#8a5a00;
--serif:Charter,"Bitstream Charter","Iowan Old Style","Sitka Text",Cambria,Georgia,serif;
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif}
@media(prefers-color-scheme:dark){:root{--paper:#14161a;--card:#1b1e23;--ink:#e8e6e1;--soft:#a3a8b1;--faint:#7a808a;
--line:#2d3138;--grid:#262a30;--c0:#7aa7ff;--c1:#f0955a;--good:#6cc491;--bad:#ff8a80;--warn:#e5b567}}
*{box-sizing:border-box}
[hidden]{display:none!important}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 var(--sans);font-variant-numeric:tabular-nums;
-webkit-text-size-adjust:100%}
main{max-width:1180px;margin:0 auto;padding:40px 28px 64px}
h1,h2,h3,p,dl,dd,figure,ul,ol{margin:0;padding:0}
h1{font:600 34px/1.15 var(--serif);letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font:600 20px/1.3 var(--serif);margin:44px 0 14px}
h3{font:600 14px/1.3 var(--sans);overflow-wrap:anywhere}
small{font-size:12px;font-weight:400;color:var(--faint)}
.sub{color:var(--soft);margin-top:6px}
.bar{height:3px;background:var(--line);margin:22px 0 0;border-radius:2px;overflow:hidden}
.bar i{display:block;height:100%;background:var(--c0)}
.tiles{display:grid;grid-template-columns:repeat(var(--columns),minmax(0,1fr));background:var(--card);
border:1px solid var(--line);border-radius:8px;overflow:hidden;margin-top:22px}
.tiles div{padding:14px 16px 12px;min-width:0;box-shadow:1px 0 0 var(--line),0 1px 0 var(--line)}
.tiles dt{font-size:12px;color:var(--soft);overflow-wrap:anywhere}
.tiles dd{font:600 22px/1.25 var(--sans);letter-spacing:-.01em;margin-top:3px;overflow-wrap:anywhere}
.tiles dd small{display:block;letter-spacing:0;line-height:1.35;margin-top:3px}
.state{display:inline-block;vertical-align:middle;margin-left:14px;padding:3px 10px;border:1px solid;border-radius:99px;
font:500 13px/1.3 var(--sans);letter-spacing:0}
.good{color:var(--good)}.bad{color:var(--bad)}.busy{color:var(--warn)}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px}
.chart{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px 16px 8px;min-width:0;
outline-offset:2px}
.chart:focus-visible{outline:2px solid var(--c0)}
.chart.wide,.chart:last-child:nth-child(even){grid-column:1/-1}
figcaption{display:flex;flex-wrap:wrap;align-items:baseline;gap:2px 16px;min-height:24px}
h3 small{margin-left:6px}
output{margin-left:auto;font-size:13px;color:var(--soft);text-align:right;overflow-wrap:anywhere}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;font-size:12px;color:var(--soft)}
.legend li::before{content:"";display:inline-block;width:14px;height:0;border-top:2px solid;vertical-align:middle;
margin-right:6px}
.legend .c0::before{border-color:var(--c0)}.legend .c1::before{border-color:var(--c1)}.legend .raw::before{opacity:.35}
.frame{display:grid;grid-template:170px 24px/46px minmax(0,1fr);margin-top:12px}
.wide .frame{grid-template-rows:280px 24px}
.up,.across,.plot{position:relative;font-size:11px;color:var(--faint)}
.up span{position:absolute;right:8px;transform:translateY(50%);line-height:1;white-space:nowrap}
.across{grid-column:2}
.across span{position:absolute;top:7px;transform:translateX(-50%);line-height:1;white-space:nowrap}
.plot{cursor:crosshair;touch-action:pan-y}
svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
path{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round;stroke-width:1.75;stroke:var(--c0)}
.grid{stroke:var(--grid);stroke-width:1}
.attempt{stroke:var(--faint);stroke-width:1;stroke-dasharray:3 3}
.skipped{stroke:var(--bad);stroke-width:1.5}
svg .c1{stroke:var(--c1)}
svg .raw{stroke-width:1;opacity:.32}
svg .dots{stroke-width:1.5}
.spots{stroke-width:6;stroke-linecap:round}
.flag{position:absolute;top:-2px;margin-left:5px;font:500 11px/1.2 var(--sans);color:var(--soft);display:none;
background:var(--card);padding:1px 4px;border-radius:3px;white-space:nowrap}
.wide .flag{display:block}
.cross{position:absolute;top:0;bottom:0;width:1px;background:var(--soft);pointer-events:none}
.dot{position:absolute;width:7px;height:7px;margin:-3.5px;border-radius:50%;background:var(--c0);pointer-events:none;
box-shadow:0 0 0 2px var(--card)}
.dot.c1{background:var(--c1)}.dot.raw{opacity:.5}
.note{font-size:13px;color:var(--faint);margin-top:10px}
.empty{color:var(--soft);background:var(--card);border:1px dashed var(--line);border-radius:8px;padding:28px;
text-align:center}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:0 36px}
.facts div{display:flex;justify-content:space-between;gap:16px;padding:7px 0;border-bottom:1px solid var(--line)}
.facts dt{color:var(--soft);overflow-wrap:anywhere}.facts dd{text-align:right;font-weight:500;overflow-wrap:anywhere}
.facts .whole{grid-column:1/-1;display:block}.facts .whole dd{text-align:left;font-weight:400;margin-top:2px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
th{font-weight:400;font-size:12px;color:var(--soft);text-align:left}
th,td{padding:8px 20px 8px 0;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
td:last-child{white-space:normal;overflow-wrap:anywhere;min-width:14em;padding-right:0}
.n{text-align:right}
details{border-bottom:1px solid var(--line)}
summary{cursor:pointer;padding:10px 0;font-weight:500}
summary::marker{color:var(--faint)}
.tree{list-style:none;padding:0 0 8px 18px;font-size:14px}
.tree .tree{border-left:1px solid var(--line);padding-bottom:2px}
.tree b{font-weight:400;color:var(--soft)}
.tree li{padding:2px 0;overflow-wrap:anywhere}
@media(max-width:760px){main{padding:24px 16px 48px}h1{font-size:27px}.charts{grid-template-columns:minmax(0,1fr)}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr))}.tiles dd{font-size:19px}
.frame{grid-template-columns:40px minmax(0,1fr)}.wide .frame{grid-template-rows:220px 24px}
output{margin-left:0;width:100%;text-align:left}}
@media print{.chart,.tiles{break-inside:avoid}body{background:none}}
"""

SCRIPT = """
(() => {
  const data = JSON.parse(document.getElementById("points").textContent);
  const [first, last] = data.domain;
  const show = v => v !== 0 && (Math.abs(v) < 0.01 || Math.abs(v) >= 1e6)
    ? v.toExponential(3).replace(/\\.?0*e/, "e").replace("e+", "e")
    : v.toLocaleString("en", {maximumSignificantDigits: 4});
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) { const mid = (low + high) >> 1; if (xs[mid] <= x) low = mid; else high = mid; }
    return x - xs[low] <= xs[high] - x ? low : high;
  };
  const charts = [...document.querySelectorAll(".chart")].map((figure, i) => {
    const plot = figure.querySelector(".plot"), output = figure.querySelector("output");
    const dots = data.charts[i].curves.map((curve, n) => {
      const dot = document.createElement("i");
      dot.className = "dot c" + curve.colour + " " + curve.kind; dot.hidden = true; plot.append(dot);
      return dot;
    });
    return {figure, plot, output, dots, rest: output.textContent, cross: plot.querySelector(".cross"),
      axis: data.charts[i].axis, curves: data.charts[i].curves};
  });
  const up = ([low, high, log], y) => {
    const held = Math.min(Math.max(y, low), high);
    return log ? Math.log(held / low) / Math.log(high / low) : (held - low) / (high - low);
  };
  const longest = charts.flatMap(c => c.curves.map(s => s.x)).reduce((a, b) => b.length > a.length ? b : a, []);
  let place = -1;
  const move = x => {
    place = nearest(longest, x);
    for (const chart of charts) {
      chart.cross.hidden = false;
      chart.cross.style.left = 100 * (x - first) / (last - first) + "%";
      let step = null;
      const words = chart.curves.map((curve, n) => {
        if (!curve.x.length) return "";
        const k = nearest(curve.x, x), dot = chart.dots[n];
        step ??= curve.step[k];
        dot.hidden = false;
        dot.style.left = 100 * (curve.x[k] - first) / (last - first) + "%";
        dot.style.bottom = 100 * up(chart.axis, curve.y[k]) + "%";
        const at = curve.kind === "dots" && curve.step[k] !== step ? " at " + curve.step[k].toLocaleString("en") : "";
        return (chart.curves.length > 1 && curve.kind !== "line" ? curve.name + " " : "") + show(curve.y[k]) + at;
      });
      if (chart.curves.length > 1 && chart.curves[0].kind === "raw") words.splice(1, 0, words.shift());
      if (step !== null) chart.output.textContent =
        ["step " + step.toLocaleString("en"), ...words.filter(w => w)].join(" \\u00b7 ");
    }
  };
  const leave = () => {
    place = -1;
    for (const chart of charts) {
      chart.cross.hidden = true;
      chart.output.textContent = chart.rest;
      for (const dot of chart.dots) dot.hidden = true;
    }
  };
  for (const {figure, plot} of charts) {
    plot.addEventListener("pointermove", event => {
      const box = plot.getBoundingClientRect(), share = (event.clientX - box.left) / box.width;
      move(first + Math.min(Math.max(share, 0), 1) * (last - first));
    });
    plot.addEventListener("pointerleave", leave);
    figure.addEventListener("blur", leave);
    figure.addEventListener("keydown", event => {
      if (event.key === "Escape") return leave();
      const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (!by || !longest.length) return;
      event.preventDefault();
      const from = place < 0 ? longest.length - (by > 0 ? 0 : 1) : place;
      move(longest[(from + by * (event.shiftKey ? 10 : 1) + longest.length) % longest.length]);
    });
  }
})();
"""
