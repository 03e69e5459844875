"""The page's style sheet."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --paper: #fbfbf9; --card: #fff; --soft: #66707f;
  --rule: #e3e5e8; --serious: #c62f3e; --warning: #b9770e; --info: #2f6db5;
  --c0: #2f6db5; --c1: #d9662b; --c2: #2e8b57; --c3: #b03a78; --c4: #7a55c7; --c5: #8a6d1f;
  --c6: #1c8c99; --c7: #5b6470; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --paper: #14171c; --card: #1c2027;
  --soft: #98a2b1; --rule: #2e343e; --serious: #ff6b78; --warning: #f0b145; --info: #7db2f0;
  --c0: #6ea8ee; --c1: #f2915c; --c2: #5dc28d; --c3: #e07db2; --c4: #ab8cf0; --c5: #d1b458;
  --c6: #55c3d0; --c7: #a8b0bc; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 36px 0 12px; }
h2 span { color: var(--soft); font-weight: 400; font-size: .85em; }
.when { color: var(--soft); margin: 2px 0 0; }
dl { display: flex; flex-wrap: wrap; gap: 8px 32px; margin: 16px 0 0; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.findings { list-style: none; margin: 0; padding: 0; display: grid; gap: 12px; }
.findings li { background: var(--card); border: 1px solid var(--rule);
  border-left: 5px solid var(--mark); border-radius: 8px; padding: 12px 16px;
  overflow-wrap: anywhere; }
.findings strong { color: var(--ink); font-weight: 600; }
.findings p { color: var(--ink); margin: 4px 0; }
.findings small { color: var(--soft); }
.findings .serious { --mark: var(--serious); }
.findings .warning { --mark: var(--warning); }
.findings .info { --mark: var(--info); }
.findings b { color: var(--mark); }
.charts { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 8px; min-width: 0; }
figure.map { margin-top: 16px; }
h3 { font-size: 14px; margin: 0 0 8px; }
.rows { display: grid; grid-template-columns: fit-content(36%) minmax(0, 1fr); gap: 4px 8px;
  font-size: 12px; color: var(--soft); }
.names { min-width: 0; overflow: hidden; }
.names span { display: block; direction: rtl; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; } /* where a name is too long, its end tells it from the others */
.rows img { min-width: 0; }
.steps { grid-column: 2; display: flex; justify-content: space-between; }
.steps span { white-space: nowrap; }
.scale b { display: inline-block; width: 96px; height: 10px; border-radius: 2px; }
svg, img { display: block; width: 100%; height: auto; }
.title { font-size: 14px; font-weight: 600; fill: var(--ink); }
.tick { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.grid { stroke: var(--rule); fill: none; }
.broken { fill: var(--serious); opacity: .3; }
.line { fill: none; stroke-width: 1.7; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: .8rem; color: var(--soft);
  padding: 0 8px 2px 46px; }
.legend i { display: inline-block; width: 12px; height: 3px; margin-right: 6px;
  vertical-align: middle; border-radius: 2px; }
.map .legend { padding-left: 0; margin-top: 6px; }
.legend i.broken, .map .legend i { height: 12px; }
.legend i.broken { background: var(--serious); }
details { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 10px 16px; margin-top: 36px; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: .8rem; }
@media (max-width: 600px) { .title { font-size: 17px; } .tick { font-size: 14px; }
  svg { overflow: visible; } }
@media print { figure, .findings li { break-inside: avoid; } }
"""
