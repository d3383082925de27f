"""Both bi-level solvers against their papers' formulas: directions to the digit, derivatives against autograd in float64."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from worker.descent import adamw, sgd
from worker.problem import Descent, Evaluation, Oracle, Params, Problem, Solver, Step
from worker.solvers.bilevel_projection import bilevel_projection
from worker.solvers.penalty_bilevel import penalty_bilevel
from worker.vectors import flat, moved, unflat

PROBLEM = Problem("forget", {"retain": 2.0})
STILL = sgd(learning_rate=0.0)


def direction(solver_of: Callable[[Descent], Solver], params: Params, oracle: Oracle, state: Any = None) -> Params:
    """What the solver would descend on; nothing moves."""
    asked: list[Params] = []

    def apply(state: Any, params: Params, grads: Params) -> tuple[Any, float, float]:
        asked.append(grads)
        return STILL.apply(state, params, grads)

    solver = solver_of(Descent(STILL.init, apply))
    solver.step(PROBLEM, solver.init(PROBLEM, params) | (state or {}), params, oracle)
    return asked[0]


def close(actual: Tensor, expected: Tensor, relative: float) -> None:
    apart = float(torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected))
    assert apart < relative, f"{apart:.1e} of its length apart"


# --- BLUR: u from two gradients that the test dictates

NAMES = [
    "0.q.lora_A.default.weight",
    "0.v.lora_A.default.weight",
    "0.q.lora_B.default.weight",
    "0.v.lora_B.default.weight",
]
MODULES = [[NAMES[0], NAMES[2]], [NAMES[1], NAMES[3]]]


def gradient(seed: int, dtype: torch.dtype = torch.float64) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, 5, generator=generator, dtype=torch.float64).to(dtype) for name in NAMES}


def says(**grads: Params) -> Oracle:
    def oracle(weights: Mapping[str, float], *, full_precision: bool = False) -> Evaluation:
        total = sum(weight * flat(grads[term]) for term, weight in weights.items())
        assert isinstance(total, Tensor)
        return Evaluation(dict.fromkeys(weights, 1.0), unflat(total, next(iter(grads.values()))))

    return oracle


def blur(forget: Params, retain: Params, **parameters: Any) -> Params:
    zero = {name: torch.zeros_like(g) for name, g in forget.items()}
    u = direction(lambda d: bilevel_projection(d, **parameters), zero, says(forget=forget, retain=retain))
    return {name: u[name] for name in forget}


def scaled(values: Params, by: float) -> Params:
    return {name: by * value for name, value in values.items()}


@pytest.mark.parametrize("scope", ["global", "module"])
@pytest.mark.parametrize("gamma", [0.00125, 1.0, 3.0])
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_moves_f_by_gamma_and_r_only_across_it(scope: str, gamma: float, dtype: torch.dtype, relative: float) -> None:
    for seed in range(10):
        f, r = gradient(seed, dtype), gradient(seed + 100, dtype)
        u = blur(f, r, gamma=gamma, scope=scope)
        for names in [NAMES, *(MODULES if scope == "module" else [])]:
            f_P, r_P, u_P = (flat({name: values[name] for name in names}).double() for values in (f, r, u))
            size = float(f_P.norm() * r_P.norm())
            assert float(f_P @ u_P) == pytest.approx(gamma * float(f_P @ f_P), abs=relative * size)
            assert float(f_P @ (u_P - gamma * f_P)) == pytest.approx(0, abs=relative * size)
            if len(names) < len(NAMES) or scope == "global":
                parallel = u_P - r_P  # what was added is along g_f alone
                close(parallel, float(parallel @ f_P / (f_P @ f_P)) * f_P, 100 * relative)


def test_the_form_of_the_authors_steering_code_is_alpha_u() -> None:
    alpha, f, r = 800.0, gradient(0), gradient(1)
    f_P, r_P = flat(f), flat(r)
    close(alpha * flat(blur(f, r, gamma=1 / alpha)), f_P + alpha * (r_P - (f_P @ r_P) / (f_P @ f_P) * f_P), 1e-12)


def test_without_a_forget_gradient_only_the_retain_gradient_is_left() -> None:
    f, r = gradient(0), gradient(1)
    for tiny in (0.0, 1e-200, 1e-9):
        close(flat(blur(scaled(f, tiny), r)), flat(r), 1e-6)
    assert float(flat(blur(scaled(f, 0.0), scaled(r, 0.0))).norm()) == 0
    weak = scaled(f, 1e-5)
    assert float(flat(weak) @ flat(blur(weak, r))) == pytest.approx(1e-10 * float(flat(f) @ flat(f)), rel=1e-6)
    half = {name: g * float(name in MODULES[0]) for name, g in f.items()}  # one module without, the other with
    u = blur(half, r, scope="module")
    assert all(torch.equal(u[name], r[name]) for name in MODULES[1])
    assert float(flat(half) @ flat(u)) == pytest.approx(float(flat(half) @ flat(half)))


def test_the_barrier_leaves_the_retain_gradient_alone_where_it_forgets_enough() -> None:
    f, r = gradient(0), gradient(1)
    agreeing = {name: r[name] + 5 * f[name] for name in NAMES}
    close(flat(blur(f, agreeing, barrier=True)), flat(agreeing), 1e-12)
    assert float((flat(blur(f, agreeing)) - flat(agreeing)).norm()) > 1
    opposed = {name: r[name] - 5 * f[name] for name in NAMES}
    assert torch.equal(flat(blur(f, opposed, barrier=True)), flat(blur(f, opposed)))


def test_scope_module_projects_each_module_on_its_own() -> None:
    f, r = gradient(0), gradient(1)
    u = blur(f, r, scope="module")
    for names in MODULES:
        alone = blur({name: f[name] for name in names}, {name: r[name] for name in names})
        close(flat({name: u[name] for name in names}), flat(alone), 1e-12)
    plain = {"a.weight": 0, "a.bias": 0, "b.weight": 1}  # without an adapter: by module path
    f, r = (
        {name: torch.randn(4, generator=torch.Generator().manual_seed(s + i)) for i, name in enumerate(plain)}
        for s in (0, 9)
    )
    u = blur(f, r, scope="module")
    of_a, of_b = ({name: values[name] for name in ("a.weight", "a.bias")} for values in (f, r)), (f, r)
    close(flat({name: u[name] for name in ("a.weight", "a.bias")}), flat(blur(*of_a)), 1e-6)
    close(u["b.weight"], flat(blur(*({"b.weight": values["b.weight"]} for values in of_b))), 1e-6)


def test_several_bounded_terms_are_retained_together() -> None:
    f, r, q = gradient(0), gradient(1), gradient(2)
    problem = Problem("forget", {"retain": 2.0, "other": 1.0})
    solver, params = bilevel_projection(sgd(learning_rate=1.0)), scaled(f, 0.0)
    _, step = solver.step(problem, solver.init(problem, params), params, says(forget=f, retain=r, other=q))
    close(-flat(params), flat(blur(f, {name: r[name] + q[name] for name in NAMES})), 1e-12)
    assert step.values == {"forget": 1.0, "retain": 1.0, "other": 1.0}


@pytest.mark.parametrize("scope", ["global", "module"])
def test_says_what_it_did(scope: str) -> None:
    f, r = gradient(0), scaled(gradient(1), 4.0)
    solver, params = bilevel_projection(sgd(learning_rate=1.0, max_grad_norm=0.5), scope=scope), scaled(f, 0.0)  # type: ignore[arg-type]
    _, step = solver.step(PROBLEM, solver.init(PROBLEM, params), params, says(forget=f, retain=r))
    f_P, r_P, u_P = flat(f), flat(r), flat(blur(f, r, scope=scope))
    assert step.extra == pytest.approx(
        {
            "forget_norm": float(f_P.norm()),
            "retain_norm": float(r_P.norm()),
            "cosine": float(f_P @ r_P / f_P.norm() / r_P.norm()),
            "xi": float((u_P - r_P) @ f_P / (f_P @ f_P)),
        }
    )
    assert step.gradient_norm == pytest.approx(float(u_P.norm()))
    close(-flat(params), u_P * (0.5 / float(u_P.norm())), 1e-6)  # clipped after it was composed


def test_ends_at_the_minimiser_of_r_over_a_plane_of_minimisers_of_f() -> None:
    normal, centre = torch.tensor([1.0, 2.0, -2.0]).double() / 3, torch.tensor([1.0, -1.0, 3.0]).double()
    params = {"w": torch.zeros(3).double()}

    def oracle(weights: Mapping[str, float], *, full_precision: bool = False) -> Evaluation:
        slopes = {"forget": (normal @ params["w"] - 1) * normal, "retain": params["w"] - centre}
        return Evaluation(dict.fromkeys(weights, 0.0), {"w": sum(w * slopes[term] for term, w in weights.items())})  # type: ignore[dict-item]

    solver = bilevel_projection(sgd(learning_rate=0.1))
    state = solver.init(PROBLEM, params)
    for _ in range(140):
        state, _ = solver.step(PROBLEM, state, params, oracle)
    torch.testing.assert_close(params["w"], centre + (1 - normal @ centre) * normal, rtol=0, atol=2e-6)


# --- a small network: derivatives against autograd

ROWS, INPUTS, HIDDEN, CLASSES = 12, 6, 5, 4
Term = Callable[[Params, Tensor], Tensor]  # the losses of these rows


class Network(NamedTuple):
    params: Params
    terms: dict[str, Term]


def npo(nll: Term, reference: Params, beta: float) -> Term:
    return lambda p, rows: -2 / beta * functional.logsigmoid(beta * (nll(p, rows) - nll(reference, rows)))


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> Network:
    """A layer of tanh and a softmax; NPO against other parameters on one batch, cross-entropy on another."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    params = {"in": normal(INPUTS, HIDDEN, scale=0.6), "out": normal(HIDDEN, CLASSES, scale=0.6)}
    reference = {name: p + normal(*p.shape, scale=0.3) for name, p in params.items()}
    x, y = normal(2, ROWS, INPUTS), torch.randint(CLASSES, (2, ROWS), generator=generator)

    def nll(batch: int) -> Term:
        return lambda p, rows: functional.cross_entropy(
            torch.tanh(x[batch, rows] @ p["in"]) @ p["out"], y[batch, rows], reduction="none"
        )

    return Network(params, {"forget": npo(nll(0), reference, 0.5), "retain": nll(1)})


class Call(NamedTuple):
    terms: list[str]
    full_precision: bool
    at: Tensor


def asks(net: Network, parts: int = 1, calls: list[Call] | None = None) -> Oracle:
    """Means over the rows, which come in so many micro-batches."""

    def oracle(weights: Mapping[str, float], *, full_precision: bool = False) -> Evaluation:
        if calls is not None:
            calls.append(Call(list(weights), full_precision, flat(net.params)))
        leaves = {name: p.detach().requires_grad_() for name, p in net.params.items()}
        values = dict.fromkeys(weights, 0.0)
        for rows in torch.arange(ROWS).chunk(parts):
            for term, weight in weights.items():
                loss = net.terms[term](leaves, rows).sum() / ROWS
                (weight * loss).backward()  # type: ignore[no-untyped-call]
                values[term] += float(loss.detach())
        return Evaluation(values, {name: p.grad for name, p in leaves.items() if p.grad is not None})

    return oracle


SIMILARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine": lambda c: c,
    "cosine_squared": torch.square,
    "relu_cosine": torch.relu,
}


class Exact(NamedTuple):
    """The paper's quantities, with L_f = -f, by double and triple backward."""

    phi_P: Tensor  # grad Phi
    retain_P: Tensor
    forget_P: Tensor  # of f
    product_P: Tensor  # (Hess Phi)(grad Phi)


def exact(net: Network, beta: float, similarity: str) -> Exact:
    theta = flat(net.params).requires_grad_()
    every = torch.arange(ROWS)
    raised, retain = (
        sign * net.terms[t](unflat(theta, net.params), every).mean() for sign, t in ((-1, "forget"), (1, "retain"))
    )
    f_P, r_P = (torch.autograd.grad(loss, theta, create_graph=True)[0] for loss in (raised, retain))
    phi = raised - beta * SIMILARITIES[similarity](functional.cosine_similarity(f_P, r_P, dim=0))
    (phi_P,) = torch.autograd.grad(phi, theta, create_graph=True)
    (product_P,) = torch.autograd.grad(phi_P, theta, grad_outputs=phi_P.detach())
    return Exact(phi_P.detach(), r_P.detach(), -f_P.detach(), product_P)


def ofmu(**parameters: Any) -> Callable[[Descent], Solver]:
    return lambda descent: penalty_bilevel(descent, **({"inner_steps": 2} | parameters))


OUTSIDE = {"taken": 2}
CASES = [(0.0, "cosine"), *((0.5, similarity) for similarity in SIMILARITIES)]


# In float32 a difference of differences keeps a digit here; on an adapter, whose curvature changes over shorter ways, two.
@pytest.mark.parametrize(
    ("dtype", "once", "twice"), [(torch.float64, 1e-6, 1e-6), (torch.float32, 1e-3, 0.2)], ids=["64", "32"]
)
@pytest.mark.parametrize(("beta", "similarity"), CASES)
def test_both_directions_are_those_of_autograd(
    beta: float, similarity: str, dtype: torch.dtype, once: float, twice: float
) -> None:
    signs = set()
    for seed in range(6):
        truth = exact(network(seed), beta, similarity)
        net = network(seed, dtype)
        inner = flat(direction(ofmu(beta=beta, similarity=similarity), net.params, asks(net)))
        close(inner.double(), -truth.phi_P, once)
        rho_s = 3.0
        outer = direction(
            ofmu(beta=beta, similarity=similarity, guard=False),
            net.params,
            asks(net),
            OUTSIDE | {"rho": 2.0, "scale": rho_s / 2},
        )
        close(flat(outer).double() - truth.retain_P, 2 * rho_s * truth.product_P, twice if beta else once)
        signs.add(float(truth.forget_P @ truth.retain_P) > 0)
    assert signs == {True, False}, "relu is to be seen on both sides"


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_first_penalty_is_rho_times_as_long_as_the_retain_gradient(beta: float) -> None:
    net, truth = network(3), exact(network(3), beta, "cosine")
    outer = flat(direction(ofmu(beta=beta, penalty=0.25, guard=False), net.params, asks(net), OUTSIDE))
    close(outer, truth.retain_P + 0.25 * truth.retain_P.norm() * truth.product_P / truth.product_P.norm(), 1e-6)


def test_without_noise_both_distances_agree_and_with_noise_they_do_not() -> None:
    net = network()
    errors = {}
    for noise in (0.0, 1e-2):
        generator = torch.Generator().manual_seed(0)

        def noisy(
            weights: Mapping[str, float], *, full_precision: bool = False, by: float = noise, g: Any = generator
        ) -> Evaluation:
            here = asks(net)(weights)
            return here._replace(
                grads={n: v * (1 + by * torch.randn(v.shape, generator=g)) for n, v in here.grads.items()}
            )

        solver = penalty_bilevel(STILL, inner_steps=2)
        _, step = solver.step(PROBLEM, solver.init(PROBLEM, net.params) | OUTSIDE, net.params, noisy)
        errors[noise] = step.extra["hessian_error"]
    assert errors[0.0] < 1e-4
    assert errors[1e-2] > 0.3


# --- what a step asks, where, and what it leaves behind


@pytest.mark.parametrize(("beta", "inside", "outside"), [(0.0, 2, 6), (0.5, 6, 30)])
def test_asks_no_more_than_it_says_and_in_full_precision_for_differences(
    beta: float, inside: int, outside: int
) -> None:
    for state, expected in (({}, inside), (OUTSIDE, outside)):
        net, calls = network(), list[Call]()
        here = flat(net.params)
        direction(ofmu(beta=beta), net.params, asks(net, calls=calls), state)
        assert len(calls) == expected
        elsewhere = [call for call in calls if not torch.equal(call.at, here)]
        assert len(elsewhere) == expected - 2
        assert all(call.full_precision for call in (calls if beta else elsewhere))


@pytest.mark.parametrize("state", [{}, OUTSIDE], ids=["inside", "outside"])
def test_the_parameters_have_their_bits_again_also_when_the_oracle_raises_at_any_call(state: dict[str, int]) -> None:
    net, calls = network(dtype=torch.float32), list[Call]()
    before = flat(net.params)
    direction(ofmu(), net.params, asks(net, calls=calls), state)
    assert torch.equal(flat(net.params), before)
    for last in range(len(calls)):
        left = iter(range(last))

        def failing(weights: Mapping[str, float], *, full_precision: bool = False, left: Any = left) -> Evaluation:
            if next(left, None) is None:
                raise FloatingPointError
            return asks(net)(weights)

        with pytest.raises(FloatingPointError):
            direction(ofmu(), net.params, failing, state)
        assert torch.equal(flat(net.params), before), f"after call {last}"


def test_moved_moves_leaves_that_require_a_gradient_and_restores_what_adding_back_would_not() -> None:
    params = {"a": torch.full((3,), 1e-3).requires_grad_(), "b": torch.tensor([[1.0, 2.0]]).requires_grad_()}
    before = flat(params)
    with moved(params, torch.arange(5.0), 300.0):
        torch.testing.assert_close(flat(params), before + 300 * torch.arange(5.0))
        assert torch.is_grad_enabled()
    assert torch.equal(flat(params), before)


@pytest.mark.parametrize(
    ("solver_of", "state", "relative"),
    [
        (bilevel_projection, {}, 1e-12),
        (lambda d: bilevel_projection(d, scope="module"), {}, 1e-12),
        (ofmu(beta=0.5), {}, 1e-7),
        (ofmu(beta=0.5), OUTSIDE, 1e-4),  # differences of differences enlarge rounding
        (ofmu(beta=0.0), OUTSIDE, 1e-10),
    ],
    ids=["blur", "blur-module", "ofmu-inside", "ofmu-outside", "ofmu-outside-plain"],
)
def test_the_direction_does_not_depend_on_how_the_batch_is_split(
    solver_of: Callable[[Descent], Solver], state: dict[str, int], relative: float
) -> None:
    net = network(1)
    whole = flat(direction(solver_of, net.params, asks(net), state))
    for parts in (2, 4):
        close(flat(direction(solver_of, net.params, asks(net, parts), state)), whole, relative)


def run(solver: Solver, net: Network, steps: int) -> tuple[Any, list[Any], list[Step]]:
    state, states, reports = solver.init(PROBLEM, net.params), [], []
    for _ in range(steps):
        state, report = solver.step(PROBLEM, state, net.params, asks(net))
        states.append(state)
        reports.append(report)
    return state, states, reports


def test_rounds_have_their_phases_their_own_optimizers_and_a_penalty_that_grows_to_its_cap() -> None:
    solver = penalty_bilevel(adamw(learning_rate=0.01), inner_steps=2, penalty=0.5, penalty_growth=2.0, penalty_max=3.0)
    state, states, reports = run(solver, network(), 12)
    assert [r.extra["phase"] for r in reports] == [0, 0, 1] * 4
    assert [r.extra["penalty"] for r in reports[2::3]] == [0.5, 1.0, 2.0, 3.0]
    assert (state["inner"]["step"], state["outer"]["step"]) == (8, 4)
    scales = [s["scale"] for s in states]
    assert scales[1] == 0 < scales[2]
    assert set(scales[2:]) == {scales[2]}
    assert [set(r.extra) - set(reports[0].extra) for r in reports[:3]] == [
        set(),
        set(),
        {"guard_fired", "hessian_error"},
    ]
    assert penalty_bilevel(STILL, penalty=5.0, penalty_max=3.0).init(PROBLEM, network().params)["rho"] == 3


def test_phases_report_the_quantities_of_where_they_are() -> None:
    net, truth = network(4), exact(network(4), 0.5, "cosine")
    values = {term: float(net.terms[term](net.params, torch.arange(ROWS)).mean()) for term in net.terms}
    solver = penalty_bilevel(sgd(learning_rate=0.01), beta=0.5)
    _, step = solver.step(PROBLEM, solver.init(PROBLEM, net.params), net.params, asks(net))
    assert step.values == pytest.approx(values)
    assert step.gradient_norm == step.extra["phi_norm"] == pytest.approx(float(truth.phi_P.norm()), rel=1e-5)
    cosine = functional.cosine_similarity(truth.forget_P, truth.retain_P, dim=0)
    assert step.extra["cosine"] == pytest.approx(float(cosine))


def test_a_gradient_of_zero_or_nearly_leaves_finite_directions() -> None:
    for by in (0.0, 1e-12):
        for vanishing in ("forget", "retain"):
            net = network()
            term = net.terms[vanishing]
            weak = Network(net.params, net.terms | {vanishing: lambda p, rows, t=term, s=by: s * t(p, rows)})
            for state in ({}, OUTSIDE):
                found = flat(direction(ofmu(), weak.params, asks(weak), state))
                assert torch.isfinite(found).all()
                assert float(found.norm()) < 1e4


def test_where_f_is_nearly_stationary_the_similarity_does_not_explode() -> None:
    net = network()
    nearly = {name: p + 1e-9 for name, p in net.params.items()}
    flattest = Network(
        net.params,
        net.terms
        | {"forget": lambda p, rows: sum((p[n] - nearly[n]).square().sum() for n in p) * torch.ones(len(rows))},
    )
    for similarity in SIMILARITIES:
        inner = flat(direction(ofmu(beta=1.0, similarity=similarity), net.params, asks(flattest)))
        assert float(inner.norm()) < 1e5  # grad c is of the order 1e8


@pytest.mark.parametrize("solver_of", [bilevel_projection, ofmu()], ids=["blur", "ofmu"])
def test_reports_what_the_bounds_are_on_where_a_term_is_a_proxy(solver_of: Callable[[Descent], Solver]) -> None:
    net = network()

    def proxy(weights: Mapping[str, float], *, full_precision: bool = False) -> Evaluation:
        return asks(net)(weights)._replace(strict={"retain": 9.0})

    solver = solver_of(STILL)
    _, step = solver.step(PROBLEM, solver.init(PROBLEM, net.params), net.params, proxy)
    assert step.values == {"forget": asks(net)({"forget": 1.0}).values["forget"], "retain": 9.0}


# --- the guard


def regression(seed: int) -> tuple[Params, Term]:
    """Softmax regression that has memorised its rows, and its negative log-likelihood."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 16, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (ROWS,), generator=generator)
    w = torch.zeros(16, CLASSES, dtype=torch.float64)
    for _ in range(60):
        w -= 3.0 / ROWS * x.T @ (torch.softmax(x @ w, -1) - functional.one_hot(y, CLASSES))
    return {"w": w}, lambda p, rows: functional.cross_entropy(x[rows] @ p["w"], y[rows], reduction="none")


def fired(params: Params, forget: Term, guard: bool = True) -> tuple[bool, float]:
    """Whether the guard did, and <the penalty's part of the direction, g_f> over their lengths."""
    net = Network(params, {"forget": forget, "retain": lambda p, rows: (p["w"] - 1).square().sum().expand(len(rows))})
    solver = penalty_bilevel(STILL, inner_steps=2, beta=0.0, guard=guard)
    _, step = solver.step(PROBLEM, solver.init(PROBLEM, params) | OUTSIDE, params, asks(net))
    outer = flat(direction(ofmu(beta=0.0, guard=guard), params, asks(net), OUTSIDE))
    f_P, r_P = (flat(asks(net)({term: 1.0}).grads) for term in ("forget", "retain"))
    penalty_P = outer - r_P
    return bool(step.extra["guard_fired"]), float(penalty_P @ f_P / f_P.norm() / penalty_P.norm())


def test_the_guard_fires_with_cross_entropy_always_and_with_npo_only_until_it_has_forgotten() -> None:
    """algorithms 2.6 O1 by count: a convex loss that is raised is relearned everywhere; NPO's concavity takes over in time."""
    shares = dict.fromkeys(["raised, memorised", "raised, forgotten", "npo, memorised", "npo, forgotten"], 0)
    for seed in range(100):
        params, nll = regression(seed)
        forget = npo(nll, {"w": params["w"].clone()}, beta=0.5)
        net = Network(params, {"forget": forget})
        for point in ("memorised", "forgotten"):
            shares[f"raised, {point}"] += fired(params, lambda p, rows, nll=nll: -nll(p, rows))[0]  # type: ignore[misc]
            shares[f"npo, {point}"] += fired(params, forget)[0]
            for _ in range(40 if point == "memorised" else 0):
                slope = asks(net)({"forget": 1.0}).grads["w"]
                params["w"] -= 0.5 * slope / slope.norm()
    assert shares["raised, memorised"] == shares["raised, forgotten"] == 100, shares
    assert shares["npo, memorised"] > 90, shares
    assert shares["npo, forgotten"] < 10, shares


def test_the_guard_leaves_the_penalty_across_the_forget_gradient() -> None:
    params, nll = regression(0)
    did, along = fired(params, lambda p, rows: -nll(p, rows))
    assert did
    assert along == pytest.approx(0, abs=1e-9)
    did, along = fired(params, lambda p, rows: -nll(p, rows), guard=False)
    assert not did
    assert along < -0.1


def test_a_product_that_is_noise_is_left_out_of_the_step_and_sets_no_scale() -> None:
    """Gradients that jump whenever they are asked for: their differences say nothing, and the outer step is that of r alone."""
    params: Params = {"x": torch.ones(4).double()}
    noise = torch.Generator().manual_seed(0)

    def oracle(weights: Mapping[str, float], *, full_precision: bool = False) -> Evaluation:
        jump = torch.randn(4, generator=noise, dtype=torch.float64) if "forget" in weights else torch.zeros(4).double()
        return Evaluation(dict.fromkeys(weights, 0.0), {"x": torch.full((4,), 2.0).double() + jump})

    solver = penalty_bilevel(sgd(learning_rate=0.5), inner_steps=1, beta=0.0, penalty=10.0)
    state = solver.init(PROBLEM, params)
    state, _ = solver.step(PROBLEM, state, params, oracle)
    before = params["x"].clone()
    state, outer = solver.step(PROBLEM, state, params, oracle)
    assert outer.extra["hessian_error"] > 0.5
    assert state["scale"] == 0.0
    torch.testing.assert_close(before - params["x"], torch.full((4,), 1.0).double())
