// Chapter 1: eta tilts nu into the best policy, nu exp(Q / eta), Eq. (1.4).

function numbers({ nu, Q }, { eta }) {
  const policy = softmax(nu.map((p, i) => Math.log(p) + Q[i] / eta));
  const price = kl(policy, nu), value = dot(policy, Q);
  const best = eta * logSumExp(nu.map((p, i) => Math.log(p) + Q[i] / eta));     // eta log E_nu exp(Q / eta)
  return { policy, price, value, worth: value - eta * price, best };
}

function program(ui, data) {
  const { a, nu, Q } = data, width = a[1] - a[0], copying = dot(nu, Q);
  const eta = ui.slider("price η", { min: -2, max: 1.5, step: .02, at: Math.log10(data.eta).toFixed(2), value: x => 10 ** x,
    show: v => v.toPrecision(2), change: draw });
  const top = ui.chart({ whole: true, height: 125, x: [-1.5, 1.5], y: data.range, ylabel: "Q", label: "Action values Q over the action." });
  const low = ui.chart({ whole: true, height: 215, x: [-1.5, 1.5], y: [0, 6], xlabel: "action a", ylabel: "density",
    label: "Densities of the behaviour policy and of the best policy at this price." });
  ui.keys(["Q", "value"], ["behaviour ν", "behavior", "area"], ["best policy π_Q ∝ ν exp(Q/η)", "target"]);
  function draw() {
    const now = numbers(data, { eta: eta.value }), density = now.policy.map(p => p / width);
    top.set({}, level(copying, "behavior"), level(now.value, "target"), line(a, Q, "value"));
    low.set({ y: [0, Math.max(4, 1.08 * Math.max(...density))] }, area(a, nu.map(p => p / width), "behavior"), line(a, density, "target"));
    ui.say(["KL[π_Q‖ν] =", now.price], ["E Q =", now.value], ["worth E Q − η KL =", now.worth], ["copying ν is worth", copying]);
  }
  draw();
}
