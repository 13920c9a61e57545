"use strict";
// The page is complete without this script: it only makes charts answer, tables sort and pictures filter.
// Names come from strangers: they are only ever put on the page as text (textContent) or drawn on a canvas.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const say = document.getElementById("say");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = (place) => css(`--s${place % 8}`);
  const faint = (text, share) => {
    const n = parseInt(text.slice(1).replace(/^(.)(.)(.)$/, "$1$1$2$2$3$3"), 16);
    return `rgba(${n >> 16},${(n >> 8) & 255},${n & 255},${share})`;
  };
  const make = (name, text, klass) => {
    const node = document.createElement(name);
    if (text !== undefined) node.textContent = text;
    if (klass) node.className = klass;
    return node;
  };
  // Eight colours; a second round of them comes with other marks and dashes.
  const turn = (place) => (place + Math.floor(place / 8)) % 4;
  const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3]];
  const MARKS = ["circle", "rect", "triangle", "rectRot"];
  const charts = [];

  const lineSets = (chart) => chart.series.flatMap((series, place) => {
    const points = series.points.map(([x, y, low, high, text]) => ({ x, y, low, high, text }));
    const main = {
      label: series.name, data: points, borderColor: colour(place), backgroundColor: colour(place), owner: place,
      borderDash: DASHES[turn(place)], pointStyle: MARKS[turn(place)], stepped: series.step ? "before" : false,
      showLine: series.joined, borderWidth: series.strong ? 3 : 1.7, pointRadius: !series.joined ? 6 : points.length > 40 ? 0 : 3.5, pointHitRadius: 8, tension: 0,
    };
    const banded = points.filter((point) => point.low !== null && point.high !== null);
    if (!series.band || banded.length < 2) return [main];
    const edge = (key, fill) => ({
      label: "", data: banded.map((point) => ({ x: point.x, y: point[key] })), owner: place, band: true, fill,
      borderWidth: 0, pointRadius: 0, pointHitRadius: 0, backgroundColor: faint(colour(place), 0.15),
    });
    return [main, edge("low", false), edge("high", "-1")];
  });

  const mapSets = (chart) => chart.classes.flatMap((name, owner) => {
    const cloud = (points, style, kind) => ({
      label: name, owner, kind, pointStyle: style, borderColor: colour(owner), backgroundColor: faint(colour(owner), 0.75),
      pointRadius: style === "circle" ? 3.2 : 4, pointBorderWidth: style === "circle" ? 0 : 1.4,
      data: points.map(([x, y], place) => ({ x, y, place })).filter((point) => chart.labels[point.place] === owner),
    });
    const sets = [cloud(chart.clean, "circle", "clean"), cloud(chart.adversarial, "crossRot", "adversarial")];
    return sets[0].data.length ? sets : [];
  });

  const barSets = (chart) => chart.series.map((series, place) => ({
    label: series.name, data: series.values.map((value, row) => ({ x: value, y: chart.names[row], text: series.texts[row], span: series.spans[row] })),
    backgroundColor: colour(place ? 0 : 7), owner: place, borderWidth: 0,
  }));

  // The names of the classes at the middle of their clean points, and threads from an image to its adversarial.
  const overlay = (chart, hidden) => ({
    id: "overlay",
    beforeDatasetsDraw(live) {
      if (!live.threads) return;
      const { ctx, scales: { x, y }, chartArea: area } = live;
      ctx.save();
      ctx.beginPath();
      ctx.rect(area.left, area.top, area.width, area.height);
      ctx.clip();
      ctx.lineWidth = 0.6;
      chart.clean.forEach(([a, b], place) => {
        const owner = chart.labels[place];
        if (hidden.has(owner)) return;
        const [c, d] = chart.adversarial[place];
        ctx.strokeStyle = faint(colour(owner), 0.5);
        ctx.beginPath();
        ctx.moveTo(x.getPixelForValue(a), y.getPixelForValue(b));
        ctx.lineTo(x.getPixelForValue(c), y.getPixelForValue(d));
        ctx.stroke();
      });
      ctx.restore();
    },
    afterDatasetsDraw(live) {
      const { ctx, scales: { x, y } } = live;
      ctx.save();
      ctx.font = "700 14px system-ui, sans-serif";
      ctx.textAlign = "center";
      ctx.textBaseline = "middle";
      ctx.lineWidth = 4;
      ctx.strokeStyle = css("--paper");
      ctx.fillStyle = css("--ink");
      for (const [owner, name] of chart.classes.length > 20 ? [] : chart.classes.entries()) {
        const own = chart.clean.filter((_, place) => chart.labels[place] === owner);
        if (!own.length || hidden.has(owner)) continue;
        const mean = (axis) => own.reduce((sum, point) => sum + point[axis], 0) / own.length;
        const text = name.length > 12 ? `${name.slice(0, 11)}…` : name;
        ctx.strokeText(text, x.getPixelForValue(mean(0)), y.getPixelForValue(mean(1)));
        ctx.fillText(text, x.getPixelForValue(mean(0)), y.getPixelForValue(mean(1)));
      }
      ctx.restore();
    },
  });

  const whiskers = {
    id: "whiskers",
    afterDatasetsDraw(live) {
      const { ctx, scales: { x } } = live;
      ctx.save();
      ctx.strokeStyle = css("--ink");
      ctx.lineWidth = 1.4;
      live.data.datasets.forEach((set, place) => live.isDatasetVisible(place) && set.data.forEach((point, row) => {
        if (!point.span) return;
        const y = live.getDatasetMeta(place).data[row].y, [low, high] = point.span.map((value) => x.getPixelForValue(value));
        ctx.beginPath();
        ctx.moveTo(low, y);
        ctx.lineTo(high, y);
        ctx.stroke();
      }));
      ctx.restore();
    },
  };

  const told = (chart, item) => {
    const raw = item.raw;
    if (chart.kind === "map") {
      const set = item.dataset;
      const end = set.kind === "clean" ? "clean" : chart.fooled[raw.place] ? "adversarial, fools" : "adversarial, held";
      return `image ${chart.indices[raw.place]}: ${set.label}, ${end}`;
    }
    if (chart.kind === "bars") return `${item.dataset.label}: ${raw.text}`;
    const span = raw.low === null || raw.low === undefined ? "" : ` (${raw.low.toFixed(1)} to ${raw.high.toFixed(1)})`;
    return `${item.dataset.label}: ${raw.y.toFixed(chart.digits)}${span} at ${raw.text}`;
  };

  const axis = (title, extra) => ({
    type: "linear", title: { display: Boolean(title), text: title, color: css("--ink") },
    ticks: { color: css("--soft") }, grid: { color: css("--edge"), lineWidth: 0.6 }, ...extra,
  });

  const across = (chart) => {
    if (chart.across) return { min: chart.across[0], max: chart.across[1], ticks: { ...axis("", {}).ticks, includeBounds: false } };
    return chart.kind === "lines" && chart.start !== null ? { min: chart.start } : {};
  };

  const settings = (chart, hidden) => {
    const sets = { lines: lineSets, map: mapSets, bars: barSets }[chart.kind](chart);
    const range = chart.range ? { min: chart.range[0], max: chart.range[1], ticks: { ...axis("", {}).ticks, includeBounds: false } } : {};
    const scales = chart.kind === "bars"
      ? { x: axis(chart.x, { min: 0, max: 100 }), y: axis("", { type: "category", labels: chart.names }) }
      : { x: axis(chart.x, across(chart)), y: axis(chart.y, range) };
    if (chart.kind === "map") for (const side of ["x", "y"]) { scales[side].ticks.display = false; scales[side].grid.display = false; }
    return {
      type: { lines: "line", map: "scatter", bars: "bar" }[chart.kind], data: { datasets: sets }, plugins: chart.kind === "map" ? [overlay(chart, hidden)] : chart.kind === "bars" ? [whiskers] : [],
      options: {
        indexAxis: chart.kind === "bars" ? "y" : "x", animation: false, responsive: true, maintainAspectRatio: false, scales,
        interaction: { mode: "nearest", intersect: chart.kind === "map" },
        plugins: {
          tooltip: { callbacks: { title: () => "", label: (item) => told(chart, item) }, filter: (item) => !item.dataset.band },
          legend: {
            position: "bottom",
            labels: { color: css("--ink"), usePointStyle: true, boxWidth: 8, boxHeight: 8, padding: 12,
              filter: (item, all) => !all.datasets[item.datasetIndex].band && all.datasets[item.datasetIndex].kind !== "adversarial" },
            onClick(_, item, legend) {
              const live = legend.chart, owner = live.data.datasets[item.datasetIndex].owner;
              const show = !live.isDatasetVisible(item.datasetIndex);
              live.data.datasets.forEach((set, place) => set.owner === owner && live.setDatasetVisibility(place, show));
              if (show) hidden.delete(owner); else hidden.add(owner);
              live.update();
            },
          },
        },
      },
    };
  };

  const enliven = (figure) => {
    const chart = data.charts[figure.dataset.chart];
    if (!chart || !window.Chart) return;
    const box = figure.querySelector(".live"), canvas = figure.querySelector("canvas"), hidden = new Set();
    if (chart.kind === "bars") box.style.height = `${Math.max(12, 5 + 1.7 * chart.names.length)}rem`;
    // A long legend takes its own room, not that of the lines.
    else if (chart.kind === "lines" && chart.series.length > 5) box.style.height = `${20 + 0.9 * chart.series.length}rem`;
    box.hidden = false;
    figure.classList.add("alive");
    const live = new window.Chart(canvas, settings(chart, hidden));
    charts.push(() => { live.options = settings(chart, hidden).options; live.data.datasets.forEach((set, place) => {
      const fresh = settings(chart, hidden).data.datasets[place];
      for (const key of ["borderColor", "backgroundColor"]) set[key] = fresh[key];
    }); live.update(); });
    figure.dataset.drawn = String(live.data.datasets.reduce((sum, set) => sum + set.data.length, 0));
    // Arrow keys walk through the points; what stands there is told.
    let set = 0, point = -1;
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], other = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step && !other) return;
      event.preventDefault();
      const open = live.data.datasets.map((_, k) => k).filter((k) => !live.data.datasets[k].band && live.isDatasetVisible(k) && live.data.datasets[k].data.length);
      if (!open.length) return;
      if (!open.includes(set)) set = open[0];
      if (other) set = open[(open.indexOf(set) + other + open.length) % open.length];
      const many = live.data.datasets[set].data.length;
      point = step ? (point + step + many) % many : Math.min(Math.max(point, 0), many - 1);
      const active = [{ datasetIndex: set, index: point }], where = live.getDatasetMeta(set).data[point].getCenterPoint();
      live.setActiveElements(active);
      live.tooltip.setActiveElements(active, where);
      live.update();
      say.textContent = told(chart, { raw: live.data.datasets[set].data[point], dataset: live.data.datasets[set] });
    });
    if (chart.kind === "map") {
      const label = make("label", undefined, "tick"), tick = make("input");
      tick.type = "checkbox";
      tick.addEventListener("change", () => { live.threads = tick.checked; live.update(); });
      label.append(tick, make("span", "Draw a thread from each image to its adversarial"));
      const line = make("p", undefined, "control");
      line.append(label);
      box.after(line);
    }
  };

  // A chart is made when it is nearly in sight, or when the page is printed or tested: long pages stay quick.
  const figures = [...document.querySelectorAll("figure.chart")];
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { watch.unobserve(entry.target); enliven(entry.target); }
  }, { rootMargin: "600px" });
  figures.forEach((figure) => watch.observe(figure));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((redraw) => redraw()));
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.print:not([open])")];
    opened.forEach((node) => { node.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((node) => { node.open = false; }));

  // -- tables that sort
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0], given = [...body.rows];
    heads.forEach((head, column) => {
      const button = make("button", head.textContent);
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const next = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort") || "none"];
        heads.forEach((one) => one.removeAttribute("aria-sort"));
        if (next !== "none") head.setAttribute("aria-sort", next);
        const key = (row) => {
          const cell = row.cells[column], text = (cell.dataset.value || cell.textContent).trim(), number = parseFloat(text);
          return /^[\d.-]/.test(text) && !Number.isNaN(number) ? number : text;
        };
        const order = (a, b) => {
          const [x, y] = [key(a), key(b)];
          const known = typeof x === typeof y;
          return known ? (x > y ? 1 : x < y ? -1 : 0) : typeof x === "number" ? -1 : 1;
        };
        const rows = given.filter((row) => !row.className), fixed = given.filter((row) => row.className);
        if (next !== "none") rows.sort((a, b) => (next === "ascending" ? order(a, b) : order(b, a)));
        body.replaceChildren(...(next === "none" ? given : [...fixed.filter((row) => row.className === "clean"), ...rows,
          ...fixed.filter((row) => row.className !== "clean")]));
      });
    });
  }

  // -- pictures
  const options = (select, texts, every) => {
    select.replaceChildren(...[[every, ""], ...texts.map((text) => [text, text])].map(([shown, value]) => {
      const option = make("option", shown);
      option.value = value;
      return option;
    }));
  };
  const PAGE = 24;
  for (const box of document.querySelectorAll("[data-gallery]")) {
    const set = data.galleries[box.dataset.gallery], form = box.querySelector("form"), cards = box.querySelector(".cards");
    const more = box.querySelector(".more"), count = box.querySelector(".count");
    let shown = PAGE;
    const distinct = (key) => [...new Set(set.pictures.map((picture) => picture[key]))];
    options(form.elements.attack, distinct("attack"), "all");
    options(form.elements.label, set.classes.filter((name) => set.pictures.some((picture) => picture.label === name)), "all");
    options(form.elements.outcome, distinct("outcome"), "all");
    const card = (picture) => {
      const item = make("li", undefined, "card"), image = make("img", undefined, picture.look), line = make("p");
      image.src = picture.data;
      image.alt = picture.alt;
      image.loading = "lazy";
      line.append(make("b", picture.clean), " → ", make("b", picture.adversarial, picture.tone));
      item.append(image, line, make("p", picture.text, "note"));
      return item;
    };
    const draw = () => {
      const wanted = ["attack", "label", "outcome"].map((key) => [key, form.elements[key].value]).filter(([, value]) => value);
      const found = set.pictures.filter((picture) => wanted.every(([key, value]) => picture[key] === value));
      cards.replaceChildren(...found.slice(0, shown).map(card));
      count.textContent = `${Math.min(shown, found.length)} of ${found.length} shown`;
      more.hidden = found.length <= shown;
    };
    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("change", () => { shown = PAGE; draw(); });
    more.addEventListener("click", () => { shown += PAGE; draw(); });
    draw();
  }

  // -- confusion, attack by attack
  for (const box of document.querySelectorAll("[data-confusion]")) {
    const set = data.confusions[box.dataset.confusion], select = box.querySelector("select"), target = box.querySelector(".target");
    const first = [...target.childNodes], names = Object.keys(set.attacks);
    if (!names.length) continue;
    options(select, names, "worst case of the main ball");
    box.querySelector(".control").hidden = false;
    const head = (texts) => {
      const row = make("tr");
      row.append(...texts.map((text) => { const cell = make("th", text); cell.scope = "col"; return cell; }));
      return row;
    };
    select.addEventListener("change", () => {
      if (!select.value) return target.replaceChildren(...first);
      const cells = set.attacks[select.value], table = make("table", undefined, set.matrix ? "matrix" : "numbers");
      const top = make("thead"), body = make("tbody"), most = Math.max(1, ...cells.map((cell) => cell[2]));
      table.append(make("caption", "Rows: true class. Columns: the label of the example.", "unseen"), top, body);
      if (set.matrix) {
        top.append(head(["", ...set.classes]));
        set.classes.forEach((name, own) => {
          const row = make("tr"), start = make("th", name);
          start.scope = "row";
          row.append(start);
          set.classes.forEach((_, other) => {
            const found = cells.find((cell) => cell[0] === own && cell[1] === other), value = found ? found[2] : 0;
            row.append(make("td", value ? String(value) : "", `h${Math.ceil((5 * value) / most)}`));
          });
          body.append(row);
        });
      } else {
        top.append(head(["true class", "taken for", "images"]));
        for (const [own, other, value] of cells.slice(0, 25)) {
          const row = make("tr"), start = make("th", set.classes[own]);
          start.scope = "row";
          row.append(start, make("td", set.classes[other]), make("td", String(value)));
          body.append(row);
        }
      }
      const wide = make("div", undefined, "wide");
      wide.append(table);
      target.replaceChildren(make("p", `Rows: true class. Columns: the label of the adversarial example. ${select.value} alone.`, "note"), wide);
    });
  }
  document.documentElement.dataset.ready = "yes";
})();
