// Chapter 4: what the schedule leaves of the action, and what the shared start costs, Eqs. (2.2) and (4.8).

// From a^0 to a^N in one jump, Eq. (P6), normalised over the cells of the grid.
function noised(p, grid, alphaBar) {
  const out = grid.map(() => 0), root = Math.sqrt(alphaBar);
  p.forEach((mass, i) => {
    if (mass < 1e-30) return;
    const row = softmax(grid.map(x => -((x - root * grid[i]) ** 2) / (2 * (1 - alphaBar))));
    row.forEach((v, j) => { out[j] += mass * v; });
  });
  return out;
}

function numbers({ grid, nu, pi, eta }, { N, betaMax }) {
  const { alphaBar } = vpSchedule(N, betaMax), left = alphaBar[N];
  const ends = { nu: noised(nu, grid, left), pi: noised(pi, grid, left) };
  const nats = kl(ends.nu, ends.pi);
  return { alphaBar, left, ends, apart: totalVariation(ends.nu, ends.pi), nats, lost: eta * nats };
}

function program(ui, data) {
  const { grid } = data, width = grid[1] - grid[0];
  const betaMax = ui.slider("β_max", { min: -10, max: 13, step: 1, at: 10, value: x => +(10 ** (x / 10)).toPrecision(2), change: draw });
  const N = ui.slider("steps N", { min: 1, max: 50, at: 5, change: draw });
  const left = ui.chart({ height: 220, x: [-.03, 1.03], y: [0, 1.04], xlabel: "n / N", title: "signal left, ᾱₙ", label: "Signal left after n of N steps." });
  const right = ui.chart({ height: 220, x: [-3, 3], y: [0, .62], xlabel: "a^N", title: "where the ways back begin",
    label: "Densities of noised behaviour, noised target and the normal start." });
  ui.keys(["ν, noised", "behavior", "area"], ["π_Q, noised", "target"], ["N(0, 1)", "neutral", "dash"]);
  const normal = grid.map(x => Math.exp(-x * x / 2) / Math.sqrt(2 * Math.PI)), u = range(101).map(i => i / 100);
  function draw() {
    const n = N.value, b = betaMax.value, now = numbers(data, { N: n, betaMax: b }), density = p => p.map(v => v / width);
    left.set({}, line(u, u.map(x => Math.exp(-.1 * x - .5 * (b - .1) * x * x)), "neutral", { width: 1.3 }),
      dots(now.alphaBar.map((_, i) => i / n), now.alphaBar, "behavior"));
    const top = Math.max(.5, ...density(now.ends.nu), ...density(now.ends.pi));
    right.set({ y: [0, 1.08 * top] }, area(grid, density(now.ends.nu), "behavior"), line(grid, normal, "neutral", { dash: "5 4", width: 1.5 }),
      line(grid, density(now.ends.pi), "target"));
    ui.say(["ᾱ_N =", now.left, 4], ["starts apart: TV =", now.apart, 4], ["value lost by sharing one, η KL[q_ν‖q_π] =", now.lost, 4]);
  }
  draw();
}
