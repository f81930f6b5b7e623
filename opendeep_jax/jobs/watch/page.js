// Values of all runs under the pointer, and a legend that hides runs. Everything drawn is there without this script.
"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const kept = { get: key => { try { return sessionStorage.getItem(key + location.pathname); } catch {} },
                 set: (key, value) => { try { sessionStorage.setItem(key + location.pathname, value); } catch {} } };
  const names = all(".legend button[data-run]").map(button => button.textContent);

  // The legend: a click hides or shows a run, with Shift only this one is left, or all of them again.
  const hidden = new Set(JSON.parse(kept.get("hidden:") || "[]").filter(name => names.includes(name)));
  const apply = () => {
    for (const element of all("[data-run]")) {
      const off = hidden.has(names[element.dataset.run]);
      if (element.tagName === "BUTTON") element.setAttribute("aria-pressed", String(!off)); else element.classList.toggle("off", off);
    }
    const show = document.getElementById("show-all");
    if (show) show.hidden = !hidden.size;
    kept.set("hidden:", JSON.stringify([...hidden]));
  };
  for (const button of all(".legend button[data-run]")) button.onclick = event => {
    const name = button.textContent, others = names.filter(other => other !== name);
    if (event.shiftKey) {
      const alone = !hidden.has(name) && others.every(other => hidden.has(other));
      hidden.clear();
      if (!alone) others.forEach(other => hidden.add(other));
    } else if (!hidden.delete(name)) hidden.add(name);
    apply();
  };
  const show = document.getElementById("show-all");
  if (show) show.onclick = () => { hidden.clear(); apply(); names.length && document.querySelector(".legend button").focus(); };
  if (names.length) apply();

  // The values: a line at x and a box beside it; arrows move it where a chart has the focus.
  const number = (y, percent) => percent ? +(100 * y).toPrecision(3) + "%" : Math.abs(y) >= 1e4 ? Math.round(y).toLocaleString("en-US") : String(+y.toPrecision(4));
  let busy = 0;
  for (const svg of all("svg[data-chart]")) {
    const chart = JSON.parse(svg.dataset.chart), figure = svg.parentNode;
    const rule = svg.querySelector(".rule"), box = document.createElement("div");
    box.className = "values"; box.hidden = true; box.setAttribute("role", "status"); figure.append(box);
    const xs = [...new Set(chart.curves.flatMap(curve => curve.x || chart.x))].sort((a, b) => a - b);
    let at = -1;
    const place = x => chart.left + (x - chart.low) / (chart.high - chart.low) * (chart.right - chart.left);
    const away = () => { if (at >= 0) busy--; at = -1; box.hidden = true; rule.style.visibility = "hidden"; };
    const draw = index => {
      if (at < 0) busy++;
      at = Math.max(0, Math.min(xs.length - 1, index));
      const x = xs[at], rows = [];
      for (const curve of chart.curves) {
        if (hidden.has(names[curve.run])) continue;
        const cx = curve.x || chart.x;
        let i = 0;  // the stretch that x is in, or the nearest value
        while (i + 1 < cx.length && Math.abs(cx[i + 1] - x) <= Math.abs(cx[i] - x)) i++;
        const gap = cx.length > 1 ? (cx[cx.length - 1] - cx[0]) / (cx.length - 1) : 0;
        if (x < cx[0] - gap || x > cx[cx.length - 1] + gap) continue;
        rows.push([curve.y[i], curve]);
      }
      rows.sort((a, b) => b[0] - a[0]);
      const head = document.createElement("b");
      head.textContent = Math.round(x).toLocaleString("en-US") + " " + chart.over;
      box.replaceChildren(head, ...rows.map(([y, curve]) => {
        const row = document.createElement("div"), name = document.createElement("span"), value = document.createElement("em");
        name.textContent = curve.name; value.textContent = number(y, chart.percent);
        const swatch = document.querySelector(`.legend [data-run="${curve.run}"] svg`);
        row.append(...(swatch ? [swatch.cloneNode(true)] : []), name, value);
        return row;
      }));
      rule.setAttribute("d", `M${place(x).toFixed(1)} ${chart.top}V${chart.bottom}`);
      rule.style.visibility = "visible";
      box.hidden = false;
      box.style.top = rows.length > 5 ? svg.getBoundingClientRect().bottom - figure.getBoundingClientRect().top + "px" : "";  // beside few curves, under many
      const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
      const px = svg.getBoundingClientRect().left - figure.getBoundingClientRect().left + place(x) * scale;
      const room = figure.clientWidth - box.offsetWidth - 6, right = px + 12;
      box.style.left = Math.max(6, Math.min(right <= room ? right : px - 12 - box.offsetWidth, room)) + "px";
    };
    const nearest = event => {
      const frame = svg.getBoundingClientRect(), ux = (event.clientX - frame.left) / frame.width * svg.viewBox.baseVal.width;
      const x = chart.low + (ux - chart.left) / (chart.right - chart.left) * (chart.high - chart.low);
      return xs.reduce((best, value, i) => Math.abs(value - x) < Math.abs(xs[best] - x) ? i : best, 0);
    };
    svg.onpointermove = svg.onpointerdown = event => draw(nearest(event));
    svg.onpointerleave = event => { if (event.pointerType !== "touch" && document.activeElement !== svg) away(); };
    document.addEventListener("pointerdown", event => { if (!svg.contains(event.target)) away(); });
    svg.onfocus = () => { if (svg.matches(":focus-visible")) draw(at < 0 ? xs.length - 1 : at); };
    svg.onblur = away;
    svg.onkeydown = event => {
      const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: 10, PageDown: -10, Home: -xs.length, End: xs.length }[event.key];
      if (event.key === "Escape") away();
      else if (step) { event.preventDefault(); draw((at < 0 ? xs.length : at) + step); }
    };
  }

  // A page of runs that go on loads itself again, at the same place; not while someone reads a chart's values.
  addEventListener("load", () => { const y = kept.get("y:"); if (y) scrollTo(0, +y); });
  const every = +document.currentScript.dataset.every;
  const again = () => { if (busy) return setTimeout(again, 1000); kept.set("y:", scrollY); location.reload(); };
  if (every) setTimeout(again, every * 1000);
})();
