// Chapter 5: the tables of both clocks, filled sweep by sweep, Eqs. (P13) and (P15) side by side.

// One sweep: all tables at once, from the old ones. V[n][s][x]; Q = V[0] from whole paths or from V_N.
function sweep(V, { reward, transition, gamma, eta, start, kernels, price, flow }, whole) {
  const S = reward.length, N = kernels.length;
  const state = range(S).map(s => whole
    ? dot(flow[0][s], V[0][s]) - eta * sum(range(N).map(n => dot(flow[n + 1][s], price[n][s])))
    : dot(start[s], V[N][s]));
  const Q = reward.map((row, s) => row.map((r, a) => r + gamma * dot(transition[s][a], state)));
  const lower = kernels.map((k, n) => k.map((rows, s) => rows.map((row, x) => dot(row, V[n][s]) - eta * price[n][s][x])));
  return [Q, ...lower];
}

function numbers(data, { sweeps, whole }) {
  let V = data.exact.map(t => t.map(row => row.map(() => 0)));
  for (let k = 0; k < sweeps; k++) V = sweep(V, data, whole);
  const error = Math.max(...V.flatMap((t, n) => t.flatMap((row, s) => row.map((v, x) => Math.abs(v - data.exact[n][s][x])))));
  return { V, error, first: dot(data.start[0], V.at(-1)[0]), exactFirst: dot(data.start[0], data.exact.at(-1)[0]) };
}

function program(ui, data) {
  const N = data.kernels.length, S = data.reward.length, names = ["left", "stay", "right"];
  let sweeps = data.sweeps;
  const how = ui.choice("Q learns from", { whole: "whole paths (P13)", steps: "the table V_N" }, draw);
  ui.button("One sweep", () => { sweeps++; draw(); });
  ui.button("Ten sweeps", () => { sweeps += 10; draw(); });
  ui.button("Empty the tables", () => { sweeps = 0; draw(); });
  const charts = range(N + 1).map(k => ui.chart({ height: k === N ? 136 : 122, x: [-.5, S - .5], y: [-.5, 2.5], xticks: range(S), yticks: false,
    xlabel: k === N ? "cell s" : "" }));
  const top = Math.max(...data.exact.flat(2)), grow = sweeps => numbers(data, { sweeps, whole: how.value === "whole" });
  function draw() {
    const now = grow(sweeps);
    charts.forEach((chart, k) => {
      const n = N - k;
      chart.set({ title: n ? `V${"₀₁₂₃₄₅₆₇₈₉"[n]}(s, x)` : "Q(s, a)", label: n ? `Table V ${n}: rows left, stay, right; columns cells.` : "Table Q: rows left, stay, right; columns cells." },
        (X, Y, near) => range(S).flatMap(s => range(3).map(x => {
          const v = now.V[n][s][x], full = Math.min(1, Math.max(0, v / top));
          const w = X(1) - X(0) - 2, h = Y(0) - Y(1) - 2, at = `x="${near(X(s) - w / 2)}" y="${near(Y(2 - x) - h / 2)}" width="${near(w)}"`;
          return `<rect ${at} height="${near(h)}" fill="none" stroke="currentColor" opacity=".25"/>` +
            `<rect x="${near(X(s) - w / 2)}" width="${near(w)}" y="${near(Y(2 - x) + h / 2 - h * full)}" height="${near(h * full)}" style="fill:var(--value)" opacity=".55"/>` +
            (w > 30 ? `<text x="${near(X(s))}" y="${near(Y(2 - x) + 4)}" text-anchor="middle">${v.toFixed(2).replace("-", "−")}</text>` : "");
        })).join(""));
    });
    ui.say(["sweeps:", String(sweeps)], ["worth of cell 0 =", now.first], ["exactly:", now.exactFirst], ["largest error in any table =", now.error]);
  }
  ui.keys([`rows: ${names.join(", ")}; a cell is full at ${top.toFixed(2)}`, "value", "area"]);
  draw();
}
