"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const report = JSON.parse(at("viewer-data").textContent);
  const body = at("images").tBodies[0];
  const rows = [...body.rows];
  const label = rows.map((r) => r.dataset.label === "1");
  const score = rows.map((r) => Number(r.dataset.score));
  const percent = (n, of) => (of ? ((100 * n) / of).toFixed(1) + "%" : "undefined");
  let current = 0;

  // --- threshold, filter, sort -----------------------------------------------------------------
  function threshold() {
    const t = Number(at("threshold").value);
    let tp = 0, fn = 0, fp = 0, tn = 0;
    rows.forEach((row, i) => {
      const flagged = score[i] >= t;
      if (label[i]) flagged ? tp++ : fn++;
      else flagged ? fp++ : tn++;
      row.cells[6].textContent = flagged ? "flagged" : "passed";
    });
    at("threshold-value").textContent = t.toFixed(3);
    at("sensitivity").textContent = percent(tp, tp + fn);
    at("specificity").textContent = percent(tn, tn + fp);
    at("counts").textContent =
      `${tp} found, ${fn} missed, ${fp} false alarms, ${tn} healthy passed`;
    filter();
  }

  function filter() {
    const t = Number(at("threshold").value), words = at("find").value.toLowerCase();
    const wanted = {
      all: () => true, healthy: (i) => !label[i], abnormal: (i) => label[i],
      flagged: (i) => score[i] >= t, alarm: (i) => !label[i] && score[i] >= t,
      miss: (i) => label[i] && score[i] < t,
    }[at("show").value];
    let n = 0;
    rows.forEach((row, i) => {
      const fits = wanted(i) && row.cells[0].textContent.toLowerCase().includes(words);
      row.hidden = !fits;
      n += fits;
    });
    at("matching").textContent = `${n} of ${rows.length} images`;
  }

  function sort(heading) {
    const column = heading.cellIndex;
    const up = heading.getAttribute("aria-sort") !== "ascending";
    for (const h of heading.parentNode.cells) h.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => {
      const cell = row.cells[column];
      return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
    };
    const compare = (a, b) => {
      if (typeof a === "string") return a.localeCompare(b, "en", { numeric: true });
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return a - b;
    };
    const order = rows.map((row) => [value(row), row]);
    order.sort((a, b) => (up ? 1 : -1) * compare(a[0], b[0]) || a[1].dataset.i - b[1].dataset.i);
    body.append(...order.map((pair) => pair[1]));
  }

  // --- one image -------------------------------------------------------------------------------
  const colours = new Uint8Array(report.colours.match(/../g).map((h) => parseInt(h, 16)));

  function picture(uri) {
    return new Promise((done, failed) => {
      if (!uri) return done(null);
      const image = new Image();
      image.onload = () => done(image);
      image.onerror = () => failed(new Error("a picture of this report is damaged"));
      image.src = uri;
    });
  }

  function bytes(image) {
    const canvas = document.createElement("canvas");
    canvas.width = image.width;
    canvas.height = image.height;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    return [canvas, context, context.getImageData(0, 0, image.width, image.height)];
  }

  function coloured(image) {
    const [canvas, context, data] = bytes(image);
    for (let i = 0; i < data.data.length; i += 4) {
      const c = 3 * data.data[i];
      data.data.set(colours.subarray(c, c + 3), i);
    }
    context.putImageData(data, 0, 0);
    return canvas;
  }

  function outline(image, level = 128, colour = [86, 180, 233, 255]) {
    const [canvas, context, data] = bytes(image);
    const w = image.width, h = image.height;
    const inside = (x, y) =>
      x >= 0 && y >= 0 && x < w && y < h && data.data[4 * (y * w + x)] >= level;
    const out = context.createImageData(w, h);
    for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) {
      const around = (r) => [[-r, 0], [r, 0], [0, -r], [0, r]];
      const here = inside(x, y);
      const meets = (r) => around(r).some(([dx, dy]) => inside(x + dx, y + dy) !== here);
      // two pixels of colour within the mask, a black one around it: seen on light and dark alike
      if (here && (meets(1) || meets(2))) out.data.set(colour, 4 * (y * w + x));
      if (!here && meets(1)) out.data.set([0, 0, 0, 255], 4 * (y * w + x));
    }
    context.putImageData(out, 0, 0);
    return canvas;
  }

  // top, left, bottom, right and score of a map's 8-connected parts from a level on, but specks
  function parts(image, level, frame) {
    const w = image.width, h = image.height, data = bytes(image)[2].data;
    const seen = new Uint8Array(w * h), found = [], least = Math.floor(w * h / report.smallest);
    for (let start = 0; start < w * h; start++) {
      if (seen[start] || data[4 * start] < level) continue;
      let [top, left, bottom, right, most, area] = [h, w, 0, 0, 0, 0];
      const open = [start];
      seen[start] = 1;
      while (open.length) {
        const p = open.pop(), x = p % w, y = (p - x) / w;
        top = Math.min(top, y); bottom = Math.max(bottom, y + 1);
        left = Math.min(left, x); right = Math.max(right, x + 1);
        most = Math.max(most, data[4 * p]);
        area++;
        for (let v = Math.max(0, y - 1); v <= Math.min(h - 1, y + 1); v++)
          for (let u = Math.max(0, x - 1); u <= Math.min(w - 1, x + 1); u++) {
            const q = v * w + u;
            if (!seen[q] && data[4 * q] >= level) { seen[q] = 1; open.push(q); }
          }
      }
      if (area < least) continue;
      const sy = frame[0] / h, sx = frame[1] / w;
      found.push([top * sy, left * sx, bottom * sy, right * sx, most / 256]);
    }
    return found.sort((a, b) => b[4] - a[4]).slice(0, report.most);
  }

  function paint(id, base, over, alpha) {
    const canvas = at(id), context = canvas.getContext("2d");
    canvas.width = base.width;
    canvas.height = base.height;
    context.drawImage(base, 0, 0);
    if (!over) return context;
    context.globalAlpha = alpha;
    context.drawImage(over, 0, 0, base.width, base.height);
    context.globalAlpha = 1;
    return context;
  }

  let loaded = null; // of the image on view
  function draw() {
    const alpha = Number(at("opacity").value) / 100;
    at("opacity-value").textContent = at("opacity").value + "%";
    if (!loaded) return;
    const { base, map, grey, mask, cam, deviation, entry } = loaded;
    const t = Number(at("pixel-threshold").value), level = Math.max(1, Math.ceil(256 * t));
    const moved = t !== 0.5 && grey; // at 0.5 the boxes are those of the run
    const boxes = moved ? parts(grey, level, entry.frame) : entry.boxes;
    at("pixel-threshold-value").textContent = t.toFixed(3);
    paint("view-image", base);
    paint("view-map", base, map, alpha);
    paint("view-cam", base, cam, alpha);
    paint("view-deviation", base, deviation, alpha);
    const context = paint("view-boxes", base, mask, 1);
    const shown = moved || boxes.length; // an image that passed has no contour unless asked
    if (grey && shown) {
      const line = outline(grey, level, [240, 228, 66, 255]);
      context.drawImage(line, 0, 0, base.width, base.height);
    }
    at("view-boxes").dataset.boxes = boxes.length;
    const sy = base.height / entry.frame[0], sx = base.width / entry.frame[1];
    for (const [top, left, bottom, right, value] of boxes) {
      const place = [left * sx, top * sy, (right - left) * sx, (bottom - top) * sy];
      for (const [colour, width] of [["#000", 4], ["#E69F00", 2]]) {
        context.strokeStyle = colour;
        context.lineWidth = width;
        context.strokeRect(...place);
      }
      context.font = "12px sans-serif";
      context.lineWidth = 3;
      context.strokeStyle = "#000";
      context.fillStyle = "#E69F00";
      const under = place[1] + place[3] + 13, y = under < base.height ? under : place[1] + 12;
      for (const how of ["strokeText", "fillText"]) context[how](value.toFixed(2), place[0], y);
    }
  }

  async function show(i) {
    current = i;
    const entry = report.images[i], cells = rows[i].cells;
    at("viewer-name").textContent = cells[0].textContent;
    let facts = `${cells[1].textContent} · ${cells[6].textContent} · score ` +
      `${cells[2].textContent} · p-value ${cells[3].textContent} · ` +
      `uncertainty ${cells[4].textContent}`;
    if (entry && entry.boxes.length) {
      facts += " · box scores " + entry.boxes.map((b) => b[4].toFixed(2)).join(", ");
    }
    at("viewer-facts").textContent = facts;
    at("viewer-none").hidden = Boolean(entry);
    at("views").hidden = !entry;
    loaded = null;
    if (!at("viewer").open) at("viewer").showModal();
    if (!entry) return;
    const names = ["image", "map", "mask", "cam", "deviation"];
    const [base, map, mask, cam, deviation] =
      await Promise.all(names.map((name) => picture(entry[name])));
    if (current !== i) return; // another image was opened meanwhile
    loaded = { base, entry, grey: map, map: map && coloured(map), mask: mask && outline(mask),
      cam: cam && coloured(cam), deviation: deviation && coloured(deviation) };
    const empty = cam && bytes(cam)[2].data.every((value, k) => k % 4 === 3 || value === 0);
    at("cam-caption").textContent = !cam ? `${report.cam}: this method has none`
      : empty ? `${report.cam} is empty: it marks no patch of this image.` : report.cam;
    at("deviation-panel").hidden = !deviation;
    draw();
    at("viewer").dataset.shown = i;
  }

  function step(by) {
    const order = [...body.rows].filter((row) => !row.hidden).map((row) => Number(row.dataset.i));
    if (!order.length) return;
    const place = order.indexOf(current);
    show(order[(place + by + order.length) % order.length]);
  }

  // --- wiring ----------------------------------------------------------------------------------
  const scale = at("scale").getContext("2d");
  for (let x = 0; x < 256; x++) {
    scale.fillStyle = "#" + report.colours.substr(6 * x, 6);
    scale.fillRect(x, 0, 1, 12);
  }
  at("live").addEventListener("submit", (event) => event.preventDefault());
  at("threshold").addEventListener("input", threshold);
  at("opacity").addEventListener("input", draw);
  at("pixel-threshold").addEventListener("input", draw);
  at("viewer").append(at("opacity").parentNode, at("pixel-threshold").parentNode); // beside it
  at("find").addEventListener("input", filter);
  at("show").addEventListener("input", filter);
  at("images").tHead.addEventListener("click", (event) => {
    const heading = event.target.closest("th");
    if (heading) sort(heading);
  });
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (row) show(Number(row.dataset.i));
  });
  at("before").addEventListener("click", () => step(-1));
  at("after").addEventListener("click", () => step(1));
  at("close").addEventListener("click", () => at("viewer").close());
  at("viewer").addEventListener("keydown", (event) => {
    if (event.target.tagName === "INPUT") return; // arrows move the slider there
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  threshold();
})();
