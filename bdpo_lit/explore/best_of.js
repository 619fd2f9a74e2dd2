// Chapter 20: the best of M candidates by Q, played; the stored returns of three trained policies.

function numbers({ runs, full }, { run, rule, M }) {
  const scores = runs[run].returns[rule][M].map(r => 100 * r / full);
  return { scores, mean: sum(scores) / scores.length, interval: runs[run].intervals[rule][M], worst: Math.min(...scores) };
}

function program(ui, data) {
  const Ms = data.Ms;
  const M = ui.slider("candidates M", { min: 0, max: Ms.length - 1, at: 0, value: i => Ms[i], change: draw });
  const rule = ui.choice("chosen by", { mean: "mean of Q", lcb: "LCB of Q" }, draw);
  const run = ui.choice("seed", Object.fromEntries(data.runs.map((r, i) => [i, r.seed])), draw);
  const left = ui.chart({ height: 220, x: [40, 120], y: [0, 60], xlabel: "score of an episode", title: "episodes", label: "Histogram of episode scores." });
  const right = ui.chart({ height: 220, x: [-.4, Ms.length - .6], y: data.range, xticks: range(Ms.length), xnames: i => Ms[i], xlabel: "M",
    title: "mean score, 95 % interval", label: "Mean score against M with intervals." });
  ui.keys(["by the mean of Q", "actor"], ["by its lower bound", "value"], ["mean of the episodes", "target", "dash"]);
  const edges = range(41).map(i => 40 + 2 * i), color = { mean: "actor", lcb: "value" };
  function draw() {
    const now = numbers(data, { run: +run.value, rule: rule.value, M: M.value });
    const counts = edges.slice(0, -1).map((e, i) => now.scores.filter(s => s >= e && s < edges[i + 1]).length);
    left.set({ y: [0, Math.max(20, 1.1 * Math.max(...counts))] }, bars(edges.slice(0, -1), edges.slice(1), counts, color[rule.value]), upright(now.mean, "target"));
    const marks = ["mean", "lcb"].flatMap((r, k) => {
      const all = Ms.map(m => numbers(data, { run: +run.value, rule: r, M: m })), x = Ms.map((_, i) => i + .12 * (2 * k - 1));
      const here = Ms.indexOf(M.value);
      return [line(x, all.map(v => v.mean), color[r], { opacity: r === rule.value ? 1 : .4 }), ...all.map((v, i) => whisker(x[i], ...v.interval, color[r])),
        ...(r === rule.value ? [dots([x[here]], [all[here].mean], color[r], { r: 6 })] : [])];
    });
    right.set({}, ...marks);
    ui.say(["M:", String(M.value)], ["mean score =", now.mean, 1], ["95 % from", now.interval[0], 1], ["to", now.interval[1], 1], ["worst episode =", now.worst, 1]);
  }
  draw();
}
