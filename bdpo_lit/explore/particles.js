// Chapter 9: the lower clock. Two crowds walk from the same noise to actions, one with the behaviour's steps,
// one with the best; the landscape is what a noisy action is worth, V_n, Eq. (P29).

function numbers({ V, qNu, qPi, paid }, { n }) {
  return { nu: dot(qNu[n], V[n]), pi: dot(qPi[n], V[n]), paid: paid[n] };
}

function program(ui, data) {
  const { grid, V, walks } = data, N = V.length - 1, width = grid[1] - grid[0], calm = matchMedia("(prefers-reduced-motion: reduce)");
  let timer = 0, shown = N;
  const at = ui.slider("steps walked", { min: 0, max: N, at: 0, show: k => `n = ${N - k}`, change: () => { stop(); glide(); } });
  const play = ui.button("Play", () => timer ? stop() : run());
  ui.button("Step", () => { stop(); move(); });
  ui.button("Restart", () => { stop(); at.set(0); shown = N; draw(); });
  const land = ui.chart({ whole: true, height: 230, x: [-2.2, 2.2], y: data.range, ylabel: "Vₙ", label: "Landscape of values at step n, with particles of both policies on it." });
  const where = ui.chart({ whole: true, height: 150, x: [-2.2, 2.2], y: [0, 1], xlabel: "noisy action aⁿ", ylabel: "density", label: "Densities of both crowds at step n." });
  ui.keys(["Vₙ", "value"], ["behaviour's particles", "behavior"], ["particles of the best policy", "actor"]);
  const value = (n, x) => {
    const i = Math.min(Math.max((x - grid[0]) / width, 0), grid.length - 1.001), k = Math.floor(i);
    return V[n][k] + (i - k) * (V[n][k + 1] - V[n][k]);
  };
  function draw() {
    const n = N - at.value, t = shown, low = Math.floor(t), mix = t - low, high = Math.min(N, low + 1);
    const blend = (f, g) => f + mix * (g - f), place = who => walks[who][low].map((x, i) => blend(x, walks[who][high][i]));
    const height = x => blend(value(low, x), value(high, x)), density = q => q[n].map(v => v / width);
    const nu = place("nu"), pi = place("pi");
    land.set({ title: n ? `V${sub(n)}: worth of a noisy action, ${n} step${n > 1 ? "s" : ""} from the end` : "V₀ = Q: worth of the action" },
      line(grid, grid.map(height), "value"), dots(nu, nu.map(x => height(x)), "behavior", { r: 5, hollow: true, opacity: .9 }),
      dots(pi, pi.map(x => height(x)), "actor", { r: 3.5, opacity: .85 }));
    where.set({ y: [0, 1.1 * Math.max(.6, ...density(data.qNu), ...density(data.qPi))] }, area(grid, density(data.qNu), "behavior"), line(grid, density(data.qPi), "actor"));
    const now = numbers(data, { n });
    ui.say(["mean of Vₙ, behaviour =", now.nu], ["best policy =", now.pi], ["paid so far, η KL =", now.paid], ["best less paid =", now.pi - now.paid]);
  }
  const sub = n => String(n).replace(/\d/g, d => "₀₁₂₃₄₅₆₇₈₉"[d]);
  function glide() {     // towards the step of the slider, at once where motion is unwelcome
    const to = N - at.value, from = shown, begun = performance.now(), lasts = calm.matches || Math.abs(to - from) > 1.5 ? 0 : 350;
    const frame = time => {
      const part = lasts ? Math.min(1, Math.max(0, time - begun) / lasts) : 1;
      shown = from + part * (to - from);
      draw();
      if (part < 1 && N - at.value === to) requestAnimationFrame(frame);
    };
    frame(begun);
  }
  function move() { at.set(at.value < N ? at.value + 1 : 0); glide(); }
  function run() {
    play.textContent = "Pause";
    if (at.value === N) { at.set(0); shown = N; draw(); }
    timer = setInterval(() => { if (!ui.box.isConnected || at.value === N) stop(); else move(); }, 700);
  }
  function stop() { clearInterval(timer); timer = 0; play.textContent = "Play"; }
  draw();
}
