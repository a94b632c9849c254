"use strict";
// The token view, the theme, and the drawing of charts when they come into view. What a model or a data set wrote is
// put in place as text (textContent) only.
(() => {
  const element = (id) => document.getElementById(id);
  const read = (id) => JSON.parse(element(id).textContent);

  // ---------------------------------------------------------------------------------------------------- theme
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (systemDark.matches ? "dark" : "light")) === "dark";
  const probe = document.body.appendChild(document.createElement("span"));
  probe.hidden = true;
  const color = (variable) => {
    probe.style.color = `var(${variable})`;
    return getComputedStyle(probe).color;
  };

  function themed() {
    element("theme").setAttribute("aria-pressed", String(isDark()));
    drawn.forEach(draw);
    if (view) show(current, focused);
  }

  // ---------------------------------------------------------------------------------------------------- charts
  const drawn = new Map(); // plot's element -> its figure as written

  /** The figure with the theme's colours in place of variables, and names as text: Plotly reads tags in them. */
  function themedFigure(value, key = "") {
    if (typeof value === "string") {
      if (key.endsWith("color") && value.startsWith("--")) return color(value);
      return key === "name" || key === "x" ? value.replaceAll("&", "&amp;").replaceAll("<", "&lt;") : value;
    }
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map((member) => themedFigure(member, key));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, member]) => [name, themedFigure(member, name)]));
  }

  function layoutOf(given) {
    const axis = (own) => ({
      gridcolor: color("--grid"),
      zerolinecolor: color("--rule"),
      linecolor: color("--rule"),
      automargin: true,
      ...own,
      title: { standoff: 6, ...own?.title },
    });
    return {
      hovermode: "x unified",
      ...themedFigure(given),
      xaxis: axis(given.xaxis),
      yaxis: axis(given.yaxis),
      margin: { l: 8, r: 10, t: 6, b: 6, ...given.margin },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("--text") },
      hoverlabel: { bgcolor: color("--panel"), bordercolor: color("--rule"), font: { color: color("--text") } },
      legend: { orientation: "h", traceorder: "normal", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 }, ...given.legend },
    };
  }

  function draw(figure, plot) {
    drawn.set(plot, figure);
    Plotly.react(plot, themedFigure(figure.data), layoutOf(figure.layout), { displayModeBar: false, responsive: true });
  }

  function drawCharts() {
    const observer = new IntersectionObserver(
      (entries) => {
        for (const { isIntersecting, target } of entries) {
          if (!isIntersecting) continue;
          observer.unobserve(target);
          draw(read(target.dataset.figure), target);
        }
      },
      { rootMargin: "300px" },
    );
    document.querySelectorAll(".plot").forEach((plot) => observer.observe(plot));
    if (view) drawValues();
  }

  // ---------------------------------------------------------------------------------------------------- colours
  // Brewer's YlGnBu and viridis, both for colour-blind eyes: low is near the background, high stands out of it.
  // Differences from zero: Brewer's PuOr, and the same hues around a dark middle.
  const PALETTES = {
    light: {
      sequential: ["#ffffd9", "#edf8b1", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#253494", "#081d58"],
      diverging: ["#b35806", "#e08214", "#fdb863", "#fee0b6", "#f7f7f7", "#d8daeb", "#b2abd2", "#8073ac", "#542788"],
    },
    dark: {
      sequential: ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"],
      diverging: ["#fdb863", "#d98a2b", "#a3620f", "#633c0d", "#2c2d33", "#3f3566", "#5f5396", "#8b80bd", "#c3bde6"],
    },
  };
  const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  /** Relative luminance of WCAG 2. */
  function luminance(rgb) {
    const [r, g, b] = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
  /** Background at `share` in [0, 1] of a palette, and black or white, whichever contrasts more. */
  function shade(stops, share) {
    const at = share * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    const [a, b] = [channels(stops[low]), channels(stops[low + 1])];
    const rgb = a.map((c, i) => Math.round(c + (b[i] - c) * (at - low)));
    return { background: `rgb(${rgb})`, text: luminance(rgb) > 0.179 ? "#000" : "#fff" };
  }

  // ---------------------------------------------------------------------------------------------------- numbers
  function format(x) {
    if (x === null || x === undefined || Number.isNaN(x)) return "–";
    if (Number.isInteger(x) && Math.abs(x) < 1e6) return String(x).replace("-", "−");
    const size = Math.abs(x);
    if (size < 1e-4 || size >= 1e6) return x.toExponential(2).replace("-", "−");
    return x.toFixed(Math.max(0, Math.min(5, 2 - Math.floor(Math.log10(size))))).replace("-", "−");
  }

  /** Half or single precision, little-endian, told apart by length. */
  function decode(text, count) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const data = new DataView(bytes.buffer);
    if (bytes.length === 4 * count) return Float64Array.from({ length: count }, (_, i) => data.getFloat32(4 * i, true));
    return Float64Array.from({ length: count }, (_, i) => {
      const bits = data.getUint16(2 * i, true);
      const [sign, exponent, fraction] = [bits & 0x8000 ? -1 : 1, (bits >> 10) & 31, (bits & 1023) / 1024];
      if (exponent === 31) return fraction ? NaN : sign * Infinity;
      return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
    });
  }

  // ---------------------------------------------------------------------------------------------------- token view
  const QUANTITIES = [
    { name: "value", label: "V̄", palette: "sequential" },
    { name: "std", label: "σ", palette: "sequential" },
    { name: "advantage", label: "advantage", palette: "diverging" },
    { name: "entropy", label: "entropy", palette: "sequential" },
    { name: "log_ratio", label: "log-ratio", palette: "diverging" },
  ];
  const view = element("samples") && read("view");
  let quantity = QUANTITIES[0];
  let listed = []; // numbers of the samples that pass the filters
  let current = -1; // number of the sample on show
  let sample = null; // what is known of it
  let focused = 0; // its token

  function load(i) {
    const packed = read(`sample-${i}`);
    const count = packed.tokens?.length ?? 0;
    const columns = Object.entries(packed.columns).map(([name, text]) => [name, decode(text, count)]);
    return { ...packed, columns: Object.fromEntries(columns) };
  }

  /** Text with what cannot be seen, or would reorder its neighbours, spelled out; a last line break stays away. */
  function spell(parent, text) {
    const hidden = /[\p{Cc}\p{Cs}\p{Zl}\p{Zp}\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]/gu;
    let end = 0;
    for (const match of text.matchAll(hidden)) {
      parent.append(text.slice(end, match.index));
      end = match.index + match[0].length;
      const symbol = parent.appendChild(document.createElement("span"));
      symbol.className = "symbol";
      const code = match[0].codePointAt(0);
      const shown = { 9: "⇥", 10: "⏎", 13: "␍" }[code];
      symbol.textContent = shown ?? `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
      if (code === 9 || (code === 10 && end < text.length)) parent.append(match[0]);
    }
    parent.append(text.slice(end));
  }

  function range() {
    const own = sample.columns[quantity.name];
    let [low, high] = view.scales[quantity.name] ?? [0, 1];
    if (element("own-scale").checked && own) {
      const finite = own.filter(Number.isFinite);
      if (finite.length) [low, high] = [Math.min(...finite), Math.max(...finite)];
    }
    if (quantity.palette === "diverging") {
      high = Math.max(Math.abs(low), Math.abs(high));
      low = -high;
    }
    return low < high ? [low, high] : [low - 0.5, low + 0.5];
  }

  function paint() {
    const stops = PALETTES[isDark() ? "dark" : "light"][quantity.palette];
    const [low, high] = range();
    element("scale-low").textContent = format(low);
    element("scale-high").textContent = format(high);
    element("scale-bar").style.background = `linear-gradient(to right, ${stops})`;
    element("scale").setAttribute("aria-label", `Scale of ${quantity.label}: ${format(low)} to ${format(high)}`);
    const column = sample.columns[quantity.name];
    [...element("response").children].forEach((token, t) => {
      const x = column ? column[t] : NaN;
      const unknown = Number.isNaN(x);
      token.classList.toggle("unknown", unknown);
      const { background, text } = shade(stops, Math.min(1, Math.max(0, (x - low) / (high - low))) || 0);
      token.style.backgroundColor = unknown ? "" : background;
      token.style.color = unknown ? "" : text;
      const marks = [masked(t) && "advantage masked", filtered(t) && "entropy filtered", answered(t) && "the environment's"].filter(Boolean);
      const said = [`token ${t + 1}: ${sample.tokens[t]}`, `${quantity.label} ${format(x)}`, ...marks];
      token.setAttribute("aria-label", said.join(", "));
    });
    document.querySelectorAll("#colour input").forEach((input) => (input.checked = input.value === quantity.name));
  }

  const answered = (t) => sample.flags.policy?.[t] === "0"; // an environment's token
  const masked = (t) => sample.flags.advantage_keep?.[t] === "0" && !answered(t);
  const filtered = (t) => sample.flags.entropy_keep?.[t] === "0" && !answered(t);

  function show(i, token = 0) {
    current = i;
    const { index } = view;
    const response = element("response");
    response.replaceChildren();
    element("prompt").replaceChildren();
    if (i < 0) {
      sample = null;
      element("sample-facts").textContent = "No response passes the filters.";
      element("token").replaceChildren();
      element("values").hidden = true;
      return;
    }
    sample = load(i);
    const facts = [`step ${index.step[i]}`, `reward ${format(index.reward[i])}`];
    const functions = Object.entries(sample.rewards);
    if (functions.length > 1) facts.push(functions.map(([name, x]) => `${name} ${format(x)}`).join(", "));
    if (sample.tokens) facts.push(`${sample.tokens.length} tokens`);
    if (sample.group !== null) facts.push(`prompt ${sample.group} of the step`);
    if (sample.truncated) facts.push("cut off at the longest length");
    if (view.runs.length > 1) facts.unshift(view.runs[index.run[i]]);
    if (!sample.tokens) facts.push("text only: no tokens were written");
    element("sample-facts").replaceChildren();
    spell(element("sample-facts"), facts.join(" · "));
    for (const controls of document.querySelectorAll(".response .controls")) controls.hidden = !sample.tokens;
    spell(element("prompt"), sample.prompt);
    if (sample.tokens) {
      const all = document.createDocumentFragment();
      sample.tokens.forEach((text, t) => {
        const span = all.appendChild(document.createElement("span"));
        span.className = "token";
        span.classList.toggle("masked", masked(t));
        span.classList.toggle("filtered", filtered(t));
        span.classList.toggle("answered", answered(t));
        span.setAttribute("role", "option");
        span.tabIndex = -1;
        spell(span, text);
        // Outside, or the marks of the token would begin the next line.
        if (text.endsWith("\n")) all.append("\n");
      });
      response.append(all);
    } else {
      const text = response.appendChild(document.createElement("span"));
      text.setAttribute("role", "option");
      spell(text, sample.completion);
    }
    if (sample.tokens) paint();
    select(Math.min(token, (sample.tokens?.length ?? 0) - 1));
    drawValues();
    const list = element("samples");
    if (list.value !== String(i)) list.value = String(i);
  }

  /** Make token t the one that Tab reaches and whose values are shown; -1: there is none. */
  function select(t, focus = false) {
    const tokens = element("response").children;
    tokens[focused]?.removeAttribute("aria-selected");
    if (tokens[focused]) tokens[focused].tabIndex = -1;
    focused = Math.max(t, 0);
    if (sample.tokens && tokens[focused]) {
      tokens[focused].setAttribute("aria-selected", "true");
      tokens[focused].tabIndex = 0;
      if (focus) tokens[focused].focus();
    }
    describe(t);
    const plot = element("values-plot");
    if (drawn.has(plot) && !element("values").hidden) Plotly.relayout(plot, { shapes: cursor() });
  }

  /** A line through the chosen token, for the chart of its values. */
  const cursor = () => [
    { type: "line", x0: focused + 1, x1: focused + 1, yref: "paper", y0: 0, y1: 1, line: { color: color("--muted"), width: 1 } },
  ];

  const ROWS = [
    ["value", "V̄"],
    ["truth", "V*, of continuations"],
    ["truth_se", "its standard error"],
    ["std", "σ"],
    ["returns", "return"],
    ["raw_advantage", "advantage, raw"],
    ["advantage", "advantage, whitened"],
    ["entropy", "entropy (nats)"],
    ["logprob", "log-prob"],
    ["sampler_logprob", "log-prob, sampler"],
    ["log_ratio", "log-ratio"],
  ];

  /** What is known of the turn of token t: who wrote it, what was called, and what the answer brought. */
  function ofTurn(t) {
    const number = sample.turns.findIndex((turn) => t < turn.until);
    if (number < 0) return [];
    const turn = sample.turns[number];
    const rows = [["turn", `${number + 1} of ${sample.turns.length}, ${answered(t) ? "the environment's" : "the policy's"}`]];
    for (const call of turn.calls ?? []) rows.push(["calls", `${call.name}(${JSON.stringify(call.arguments)})`]);
    if (typeof turn.observation === "string") rows.push(["observation", JSON.stringify(turn.observation)]);
    if (turn.reward) rows.push(["reward of the answer", format(turn.reward)]);
    if (turn.failures) rows.push(["failures", String(turn.failures)]);
    if (turn.timed_out) rows.push(["no answer in time", "1"]);
    if (turn.luck !== undefined) {
      rows.push(["V̄ before the answer", format(turn.value_before)], ["V̄ after it", format(turn.value_after)], ["its luck", format(turn.luck)]);
    }
    return rows;
  }

  function describe(t) {
    const box = element("token");
    box.replaceChildren();
    if (t < 0 || !sample.tokens) {
      box.textContent = sample.tokens ? "The response has no tokens." : "There are no values per token.";
      return;
    }
    const text = box.appendChild(document.createElement("div"));
    text.className = "token-text";
    text.textContent = JSON.stringify(sample.tokens[t]);
    const rows = [["position", `${t + 1} of ${sample.tokens.length}`]];
    if (sample.turns) rows.push(...ofTurn(t));
    for (const [name, label] of ROWS) {
      if (sample.columns[name]) rows.push([label, format(sample.columns[name][t])]);
      if (name === "value") {
        for (let m = 0; sample.columns[`value_${m}`]; m++) {
          rows.push([`V of critic ${m}`, format(sample.columns[`value_${m}`][t])]);
        }
      }
    }
    if (sample.columns.log_ratio) rows.push(["ratio", format(Math.exp(sample.columns.log_ratio[t]))]);
    if (sample.flags.advantage_keep && !answered(t)) rows.push(["in the policy loss", masked(t) ? "masked" : "kept"]);
    if (sample.flags.entropy_keep && !answered(t)) rows.push(["in the entropy bonus", filtered(t) ? "filtered" : "kept"]);
    const body = box.appendChild(document.createElement("table")).appendChild(document.createElement("tbody"));
    for (const [label, value] of rows) {
      const row = body.appendChild(document.createElement("tr"));
      const head = row.appendChild(document.createElement("th"));
      head.scope = "row";
      head.textContent = label;
      row.appendChild(document.createElement("td")).textContent = value;
    }
  }

  function drawValues() {
    const plot = element("values-plot");
    const critics = Object.keys(sample?.columns ?? {}).filter((name) => /^value_\d+$/.test(name));
    const shown = critics.length && sample.columns.value && sample.tokens.length;
    element("values").hidden = !shown;
    if (!shown || !window.Plotly) return;
    const position = sample.tokens.map((_, t) => t + 1);
    const line = (name, y, n, dash, width = 1.4) => ({
      type: "scatter", mode: "lines", name, x: position, y: Array.from(y),
      line: { color: `--series-${n}`, dash, width },
    });
    const reward = view.index.reward[current];
    const data = critics.map((name, m) => line(`critic ${m}`, sample.columns[name], (m % 6) + 2, ["dash", "dot", "dashdot"][m % 3]));
    data.push(line("V̄", sample.columns.value, 1, "solid", 2.4));
    if (sample.columns.truth) {
      const known = position.filter((_, t) => Number.isFinite(sample.columns.truth[t]));
      const at = (name) => known.map((t) => sample.columns[name][t - 1]);
      data.push({
        type: "scatter", mode: "markers", name: "V*", x: known, y: at("truth"), marker: { color: "--text", size: 8, symbol: "diamond" },
        error_y: { type: "data", array: at("truth_se"), thickness: 1.2, width: 4 },
      });
    }
    if (reward !== null) data.push(line("reward", position.map(() => reward), 7, "longdash", 1));
    const ticks = position.length <= 30 ? { tick0: 1, dtick: Math.ceil(position.length / 15) } : {};
    const layout = { xaxis: { title: { text: "token" }, ...ticks }, yaxis: {}, showlegend: true, shapes: cursor() };
    draw({ data, layout }, plot);
  }

  function filter() {
    const { index } = view;
    const limit = (id, otherwise) => (element(id).value === "" ? otherwise : Number(element(id).value));
    const [run, split] = [element("filter-run").value, element("filter-split").value];
    const [first, last] = [limit("step-from", -Infinity), limit("step-to", Infinity)];
    const [least, most] = [limit("reward-from", -Infinity), limit("reward-to", Infinity)];
    const rewardAsked = least !== -Infinity || most !== Infinity;
    listed = [];
    index.step.forEach((step, i) => {
      const reward = index.reward[i];
      const rewarded = reward === null ? !rewardAsked : reward >= least && reward <= most;
      if (index.split[i] === split && (run === "" || index.run[i] === Number(run)) && step >= first && step <= last && rewarded) {
        listed.push(i);
      }
    });
    const all = document.createDocumentFragment();
    for (const i of listed) {
      const length = index.length[i] === null ? "" : ` · ${index.length[i]} tokens`;
      all.append(new Option(`step ${index.step[i]} · ${format(index.reward[i])}${length}`, i));
    }
    element("samples").replaceChildren(all);
    element("count").textContent = `${listed.length.toLocaleString("en")} of ${index.step.length.toLocaleString("en")} responses`;
    show(listed.includes(current) ? current : (listed[0] ?? -1));
  }

  /** Go `by` responses on; keep the focus where it was, in the tokens or outside them. */
  function step(by) {
    const next = listed[listed.indexOf(current) + by];
    if (next === undefined) return;
    const inTokens = element("response").contains(document.activeElement);
    show(next);
    if (inTokens) select(0, true);
  }

  function key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.type === "number") return;
    const inTokens = event.target.closest?.("#response");
    const inList = event.target.closest?.("select");
    const last = (sample?.tokens?.length ?? 0) - 1;
    const moves = inTokens && last >= 0 && {
      ArrowRight: Math.min(focused + 1, last), ArrowLeft: Math.max(focused - 1, 0), Home: 0, End: last,
    };
    if (moves && event.key in moves) select(moves[event.key], true);
    else if (event.key === "j" || (event.key === "ArrowDown" && inTokens)) step(1);
    else if (event.key === "k" || (event.key === "ArrowUp" && inTokens)) step(-1);
    else if (view.scales[QUANTITIES[event.key - 1]?.name] && !inList) {
      quantity = QUANTITIES[event.key - 1];
      if (sample?.tokens) paint();
    } else return;
    event.preventDefault();
  }

  function prepare() {
    QUANTITIES.forEach((q, i) => {
      const label = element("colour").appendChild(document.createElement("label"));
      const input = label.appendChild(document.createElement("input"));
      Object.assign(input, { type: "radio", name: "quantity", value: q.name, disabled: !view.scales[q.name] });
      label.append(` ${q.label}`);
      label.title = input.disabled ? "not written by this run" : `key ${i + 1}`;
      input.addEventListener("change", () => {
        quantity = q;
        if (sample?.tokens) paint();
      });
    });
    quantity = QUANTITIES.find((q) => view.scales[q.name]) ?? quantity;
    const runs = element("filter-run");
    runs.append(new Option("all", ""), ...view.runs.map((name, i) => new Option(name, i)));
    if (!view.index.split.includes("train")) element("filter-split").value = "eval";
    const form = element("filters");
    form.addEventListener("input", filter);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(filter));
    element("own-scale").addEventListener("change", () => sample?.tokens && paint());
    element("samples").addEventListener("change", (event) => show(Number(event.target.value)));
    const response = element("response");
    const place = (event) => [...response.children].indexOf(event.target.closest(".token"));
    response.addEventListener("click", (event) => place(event) >= 0 && select(place(event), true));
    response.addEventListener("mouseover", (event) => sample?.tokens && place(event) >= 0 && describe(place(event)));
    response.addEventListener("mouseleave", () => sample?.tokens && describe(focused));
    element("tokens").addEventListener("keydown", key);
    filter();
    element("tokens").getBoundingClientRect(); // the layout is part of the time
    performance.mark("tokens-ready");
  }

  element("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    themed();
  });
  systemDark.addEventListener("change", themed);
  element("theme").setAttribute("aria-pressed", String(isDark()));
  if (view) prepare();
  // Plotly comes after this script in the page, so that the tokens need not wait for it.
  document.addEventListener("DOMContentLoaded", drawCharts);
})();
