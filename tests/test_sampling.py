"""The sampler and the mix: against analytic scores, slow twins and exact identities."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sample_scoremix
from sample_scoremix import draw_noise, folder_name, image_noise, mixed_denoiser, sample, timesteps
from train_diffusion import Schedule, UNet

SHAPE = (1, 2, 3)
MEANS = torch.stack(
    [torch.linspace(-1.0, 2.0, 6).view(SHAPE), torch.linspace(1.5, -0.5, 6).view(SHAPE), torch.zeros(SHAPE)]
)
STD = 0.4


class GaussianModel:
    """The exact network for classes N(mean_y, STD^2): it predicts v (or eps, x0) from E[x0 | x_t]. Counts its calls."""

    def __init__(self, schedule, predict="v", means=MEANS):
        self.schedule, self.predict, self.means, self.num_classes, self.batches = (
            schedule,
            predict,
            means,
            len(means) - 1,
            [],
        )

    def __call__(self, x, t, y):
        self.batches.append(len(x))
        pairs = torch.tensor([self.schedule.coefficients(float(u)) for u in t], dtype=torch.float64)
        a, s = pairs[:, 0, None, None, None], pairs[:, 1, None, None, None]
        mean = self.means[y].double()
        x0 = mean + a * STD**2 * (x - a * mean) / (a**2 * STD**2 + s**2)
        return {"v": (a * x - x0) / s, "eps": (x - a * x0) / s, "x0": x0}[self.predict]


def source(seed):
    """The noise of one image, as image_noise gives it."""
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator)


def draw(model, schedule, y, weights, n=64, steps=50, eta=0.0, clip=False, **kw):
    sources = [source(i) for i in range(n)]
    x_T = draw_noise(sources, SHAPE, "cpu")
    denoise = mixed_denoiser(
        model, schedule, getattr(model, "predict", "v"), torch.tensor([y] * n), weights, clip=clip, **kw
    )
    return sample(denoise, x_T, schedule, "ddim", steps, eta, sources)


@pytest.mark.parametrize("predict", ["v", "eps", "x0"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.5, 1.0])
def test_mixed_score_of_equal_variance_gaussians_is_the_gaussian_between(lam, eta, predict):
    schedule = Schedule()
    between = (lam * MEANS[0] + (1 - lam) * MEANS[1])[None].repeat(2, 1, 1, 1)
    mixed = draw(GaussianModel(schedule, predict), schedule, [0, 1], [lam, 1 - lam], eta=eta)
    direct = draw(GaussianModel(schedule, predict, between), schedule, [0], [1.0], eta=eta)
    assert (mixed - direct).abs().max() < (2e-3 if predict == "eps" else 1e-4)  # eps loses digits where a is near 0


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_have_the_moments_of_the_mix(eta):
    schedule, n = Schedule(), 1500
    x = draw(GaussianModel(schedule), schedule, [0, 1], [0.25, 0.75], n=n, steps=100, eta=eta)
    assert (x.mean(0) - (0.25 * MEANS[0] + 0.75 * MEANS[1])).abs().max() < 5 * STD / math.sqrt(n)
    assert (x.std(0) - STD).abs().max() < 5 * STD / math.sqrt(2 * n)


def test_deterministic_ddim_follows_the_exact_flow():
    schedule = Schedule()
    x_T = draw_noise([source(i) for i in range(8)], SHAPE, "cpu")
    a, s = schedule.coefficients(schedule.T - 1)
    exact = MEANS[0] + STD * (x_T - a * MEANS[0]) / math.sqrt(a**2 * STD**2 + s**2)
    errors = [
        (draw(GaussianModel(schedule), schedule, [0], [1.0], n=8, steps=k) - exact).abs().max() for k in (50, 200)
    ]
    assert errors[1] < 0.01 and errors[1] < errors[0] / 2


def slow_ddim(denoise, x, abar, times, eta, noises):
    """Song et al. 2021, Eq. 12 and 16, in float64, one number at a time."""
    x = x.double().numpy().copy()
    for k, (t, u) in enumerate(zip(times, times[1:])):
        now, after = abar[t], (abar[u] if u >= 0 else 1.0)
        x0 = denoise(torch.from_numpy(x).float(), torch.full((len(x),), t)).double().numpy()
        sigma = eta * math.sqrt((1 - after) / (1 - now)) * math.sqrt(1 - now / after)
        for i in np.ndindex(x.shape):
            eps = (x[i] - math.sqrt(now) * x0[i]) / math.sqrt(1 - now)
            x[i] = math.sqrt(after) * x0[i] + math.sqrt(1 - after - sigma**2) * eps + sigma * noises[k][i]
    return x


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_step_against_a_slow_twin(eta):
    schedule, steps, n = Schedule(), 7, 3
    denoise = mixed_denoiser(GaussianModel(schedule), schedule, "v", torch.tensor([[0, 1]] * n), [0.5, 0.5])
    sources = [source(i) for i in range(n)]
    x_T = draw_noise(sources, SHAPE, "cpu")
    fast = sample(denoise, x_T, schedule, "ddim", steps, eta, sources)
    twins = [source(i) for i in range(n)]
    draw_noise(twins, SHAPE, "cpu")
    noises = [draw_noise(twins, SHAPE, "cpu").numpy() for _ in range(steps)]
    slow = slow_ddim(denoise, x_T, schedule.abar, timesteps(schedule, "ddim", steps), eta, noises)
    assert np.abs(fast.numpy() - slow).max() < 1e-4


def test_ddpm_is_the_ancestral_posterior():
    """x' ~ N(posterior mean, posterior variance) of Ho et al. 2020, Eq. 6 and 7, over all T steps."""
    schedule, n = Schedule(T=20), 3
    denoise = mixed_denoiser(GaussianModel(schedule), schedule, "v", torch.tensor([[0]] * n), [1.0], clip=False)
    sources = [source(i) for i in range(n)]
    x = draw_noise(sources, SHAPE, "cpu")
    found = sample(denoise, x, schedule, "ddpm", 20, sources=sources)
    with pytest.raises(ValueError, match="a source of it for each image"):
        sample(denoise, x, schedule, "ddpm", 20)
    twins = [source(i) for i in range(n)]
    x = draw_noise(twins, SHAPE, "cpu").double()
    for t in range(19, -1, -1):
        abar, before = schedule.abar[t], schedule.abar[t - 1] if t else 1.0
        beta = 1 - abar / before
        x0 = denoise(x.float(), torch.full((n,), t)).double()
        x = math.sqrt(before) * beta / (1 - abar) * x0 + math.sqrt(1 - beta) * (1 - before) / (1 - abar) * x
        if t:
            x = x + math.sqrt((1 - before) / (1 - abar) * beta) * draw_noise(twins, SHAPE, "cpu")
    assert (found - x).abs().max() < 1e-4


def exact_flow(x, t, t_next, schedule):
    """Where the probability flow of N(MEANS[0], STD^2) takes x from t to t_next: the quantile stays the same."""
    (a, s), (b, r) = (schedule.coefficients(u) for u in (t, t_next))
    return b * MEANS[0] + (x - a * MEANS[0]) * math.sqrt((b**2 * STD**2 + r**2) / (a**2 * STD**2 + s**2))


@pytest.mark.parametrize("solver, order", [("ddim", 1), ("heun", 2), ("dpm++", 2)])
def test_order_of_convergence(solver, order):
    """In continuous time, on a fixed interval of log-SNR that ends before abar = 1, unclipped, in float64."""
    schedule, errors = Schedule(), []
    x = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def denoise(x, t):  # E[x0 | x_t], exactly
        a, s = schedule.coefficients(float(t[0]))
        return MEANS[0] + a * STD**2 * (x - a * MEANS[0]) / (a**2 * STD**2 + s**2)

    # log(s/a) is linear between training steps only, so the times meet the analytic scores through a smooth schedule
    class Smooth(Schedule):
        def coefficients(self, t):
            abar = math.cos((float(t) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
            return math.sqrt(abar), math.sqrt(1 - abar)

    schedule = Smooth()
    ends = [math.log(s / a) for a, s in map(schedule.coefficients, (950, 50))]
    counts = [32, 64, 128]
    for n in counts:
        sigmas = np.exp(np.linspace(*ends, n + 1))
        times = [1000 * (1.008 * 2 / math.pi * math.atan(v) - 0.008) for v in sigmas]
        found = sample(denoise, x, schedule, solver, times=times)
        errors.append(float((found - exact_flow(x, times[0], times[-1], schedule)).abs().max()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.25, (slope, errors)


@pytest.mark.parametrize("solver", ["heun", "dpm++"])
def test_second_order_solvers_draw_the_gaussian_between_with_few_steps(solver):
    """Mixing in both evaluations of Heun, the mixed x0 in the history of dpm++: the exact case of equal variances."""
    schedule, n = Schedule(), 32
    x_T = draw_noise([source(i) for i in range(n)], SHAPE, "cpu")
    model = GaussianModel(schedule)
    denoise = mixed_denoiser(model, schedule, "v", torch.tensor([[0, 1]] * n), [0.3, 0.7], clip=False)
    mean = 0.3 * MEANS[0] + 0.7 * MEANS[1]
    ddim, found = (sample(denoise, x_T, schedule, s, 20) for s in ("ddim", solver))
    exact = mean + STD * x_T  # the flow from almost pure noise keeps the quantile
    error, of_ddim = ((v - exact).abs().max() for v in (found, ddim))
    assert error < 0.06 and error < of_ddim / 2, (error, of_ddim)
    model.batches.clear()
    sample(denoise, x_T, schedule, solver, 20)
    assert len(model.batches) == sample_scoremix.evaluations(solver, 20) == (39 if solver == "heun" else 20)


def slow_dpm(denoise, x, abar, times):
    """DPM-Solver++(2M) as METHOD of Lu et al. 2022 states it, in float64."""
    x, history = x.double(), []
    for t, u in zip(times, times[1:]):
        x0 = denoise(x.float(), torch.full((len(x),), t)).double()
        if u < 0:
            return x0
        lam = [math.log(math.sqrt(v) / math.sqrt(1 - v)) for v in (abar[t], abar[u])]
        h, a, s = lam[1] - lam[0], math.sqrt(abar[u]), [math.sqrt(1 - abar[v]) for v in (t, u)]
        d = x0 if not history else x0 + 0.5 * (x0 - history[-1][1]) / (history[-1][0] / h)
        x = s[1] / s[0] * x - a * math.expm1(-h) * d
        history.append((h, x0))


def test_dpm_step_against_a_slow_twin():
    schedule, n = Schedule(), 3
    denoise = mixed_denoiser(GaussianModel(schedule), schedule, "v", torch.tensor([[0, 1]] * n), [0.5, 0.5])
    x_T = draw_noise([source(i) for i in range(n)], SHAPE, "cpu")
    slow = slow_dpm(denoise, x_T, schedule.abar, timesteps(schedule, "dpm++", 9))
    assert (sample(denoise, x_T, schedule, "dpm++", 9) - slow).abs().max() < 1e-4


def test_noise_levels_of_heun():
    """EDM's rho = 7 grid from sigma 80 to that of t = 0, each met by its time, and by what the network sees there."""
    schedule, steps = Schedule(), 16
    times = timesteps(schedule, "heun", steps)
    sigma = [s / a for a, s in map(schedule.coefficients, times)]
    low = math.exp(schedule.log_sigma[0])
    expected = [(80 ** (1 / 7) + i / 15 * (low ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(steps)] + [0.0]
    assert times[-1] == -1 and sigma == pytest.approx(expected, rel=1e-9)
    a, s = schedule.at(torch.tensor(times[:-1]))
    assert (s / a).flatten().tolist() == pytest.approx(expected[:-1], rel=1e-3)
    assert (a**2 + s**2 - 1).abs().max() < 1e-6
    whole = torch.tensor([0, 1, 500, 998, 999])  # at the training steps themselves, both ways to the numbers agree
    for exact, between in zip(schedule.at(whole), schedule.at(whole.double())):
        assert (exact - between).abs().max() < 1e-5


def test_condition_mixing_is_one_evaluation_under_the_weighted_embedding(unet):
    """AugGen: the network sees alpha c_a + beta c_b, once a step; guidance adds the null class."""
    schedule, x, t = Schedule(), torch.randn(3, 1, 8, 8), torch.full((3,), 300)
    y, (a, s) = torch.tensor([[0, 2]] * 3), schedule.coefficients(300)
    c = 0.7 * unet.label.weight[0] + 0.8 * unet.label.weight[2]
    direct, null = ((a * x - s * unet(x, t, v)) for v in (c.expand(3, -1), torch.tensor([3, 3, 3])))
    mixed = mixed_denoiser(unet, schedule, "v", y, [0.7, 0.8], clip=False, mix="condition")(x, t)
    assert (mixed - direct).abs().max() < 1e-5
    guided = mixed_denoiser(unet, schedule, "v", y, [0.7, 0.8], 2.0, False, "condition")(x, t)
    assert (guided - (2 * direct - null)).abs().max() < 1e-5
    alone = mixed_denoiser(unet, schedule, "v", y, [1.0, 0.0], clip=False, mix="condition")(x, t)
    assert (alone - mixed_denoiser(unet, schedule, "v", y[:, :1], [1.0], clip=False)(x, t)).abs().max() < 1e-5
    by_score = mixed_denoiser(unet, schedule, "v", y, [0.5, 0.5], clip=False)(x, t)
    by_condition = mixed_denoiser(unet, schedule, "v", y, [0.5, 0.5], clip=False, mix="condition")(x, t)
    assert (by_score - by_condition).abs().max() > 3e-5  # the network is not linear in the condition


def test_every_image_may_have_weights_of_its_own(unet):
    schedule, x, t = Schedule(), torch.randn(2, 1, 8, 8), torch.full((2,), 600)
    y, lam = torch.tensor([[0, 1], [2, 1]]), [[0.2, 0.8], [0.9, 0.1]]
    for mix in ("score", "condition"):
        both = mixed_denoiser(unet, schedule, "v", y, lam, mix=mix)(x, t)
        for i in range(2):
            one = mixed_denoiser(unet, schedule, "v", y[i : i + 1], lam[i], mix=mix)(x[i : i + 1], t[:1])
            assert (both[i : i + 1] - one).abs().max() < 1e-5


def test_outside_the_window_of_noise_levels_the_first_class_stands_alone(unet):
    schedule, x, y = Schedule(), torch.randn(2, 1, 8, 8), torch.tensor([[0, 2]] * 2)
    sigma = math.exp(schedule.log_sigma[500])
    window = mixed_denoiser(unet, schedule, "v", y, [0.3, 0.7], window=(sigma / 2, sigma * 2))
    mixed = mixed_denoiser(unet, schedule, "v", y, [0.3, 0.7])
    alone = mixed_denoiser(unet, schedule, "v", y, [1.0, 0.0])
    for t, inside in ((500, True), (950, False), (50, False)):
        t = torch.full((2,), t)
        assert torch.equal(window(x, t), (mixed if inside else alone)(x, t))
        assert not torch.equal(window(x, t), (alone if inside else mixed)(x, t))


def test_dirichlet_weights_follow_from_the_image_alone():
    lam = [sample_scoremix.image_weights(3, ("a", "b"), i, 0.7) for i in range(4000)]
    assert lam[5] == sample_scoremix.image_weights(3, ("a", "b"), 5, 0.7)
    assert lam[5] != sample_scoremix.image_weights(4, ("a", "b"), 5, 0.7)
    first = np.array(lam)[:, 0]
    assert np.allclose(np.sum(lam, axis=1), 1) and abs(first.mean() - 0.5) < 0.03
    assert first.var() == pytest.approx(1 / (4 * (2 * 0.7 + 1)), rel=0.1)  # of a Beta(0.7, 0.7)


def test_autoguidance_extrapolates_from_the_weak_mix_and_clips_last():
    schedule, n = Schedule(), 4
    y, x_t, t = torch.tensor([[0, 1]] * n), torch.randn(n, *SHAPE), torch.full((n,), 400)
    strong, weak = (
        mixed_denoiser(GaussianModel(schedule, means=m), schedule, "v", y, [0.5, 0.5], clip=False)
        for m in (MEANS, MEANS / 2)
    )
    both = sample_scoremix.autoguided(strong, weak, 1.5, clip=False)(x_t, t)
    assert (both - (weak(x_t, t) + 1.5 * (strong(x_t, t) - weak(x_t, t)))).abs().max() < 1e-5
    assert (sample_scoremix.autoguided(strong, weak, 1.5)(x_t, t) - both.clamp(-1, 1)).abs().max() < 1e-6
    assert (sample_scoremix.autoguided(strong, weak, 1.0, clip=False)(x_t, t) - strong(x_t, t)).abs().max() < 1e-6


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_times_fall_from_the_last_training_step_to_the_clean_image(T, steps):
    times = timesteps(Schedule(T), "ddim", min(T, steps))
    assert times[0] == T - 1 and times[-1] == -1 and len(times) == min(T, steps) + 1
    assert all(a > b for a, b in zip(times, times[1:]))


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    model = UNet(3, 1, 8, [1, 2], 1, [1], 2).eval()
    for p in model.parameters():  # the zero-initialised layers, too
        torch.nn.init.normal_(p, 0, 0.1)
    return model.requires_grad_(False)


def unet_sample(unet, y, weights, clip=True, **kw):
    x_T = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    schedule = Schedule()
    return sample(
        mixed_denoiser(unet, schedule, "v", torch.tensor([y] * 4), weights, clip=clip, **kw), x_T, schedule, steps=5
    )


def test_weight_one_is_the_single_class_and_swapping_changes_nothing(unet):
    alone = unet_sample(unet, [2], [1.0])
    assert (unet_sample(unet, [2, 0], [1.0, 0.0]) - alone).abs().max() < 1e-5
    assert (unet_sample(unet, [0, 2], [0.0, 1.0]) - alone).abs().max() < 1e-5
    mixed = unet_sample(unet, [0, 2], [0.3, 0.7])
    assert (unet_sample(unet, [2, 0], [0.7, 0.3]) - mixed).abs().max() < 1e-5
    assert (mixed - alone).abs().max() > 1e-3  # the classes do differ
    three = unet_sample(unet, [0, 1, 2], [0.3, 0.0, 0.7])
    assert (three - mixed).abs().max() < 1e-5


def test_mixing_eps_v_or_x0_is_the_same_for_convex_weights_and_not_for_others(unet):
    schedule, x, t = Schedule(), torch.randn(1, 1, 8, 8), torch.tensor([700])
    a, s = schedule.coefficients(700)
    v = [unet(x, t, torch.tensor([c])) for c in (0, 1)]
    for lam, same in (((0.4, 0.6), True), ((0.7, 0.7), False)):
        found = mixed_denoiser(unet, schedule, "v", torch.tensor([[0, 1]]), lam, clip=False)(x, t)
        eps = sum(w * (s * x + a * out) for w, out in zip(lam, v))
        by_eps = (x - s * eps) / a
        by_v = a * x - s * sum(w * out for w, out in zip(lam, v))
        by_x0 = sum(w * (a * x - s * out) for w, out in zip(lam, v))
        assert (found - by_x0).abs().max() < 1e-5
        for other in (by_eps, by_v):
            assert bool((found - other).abs().max() < 1e-4) == same


def test_the_clip_comes_after_the_mix():
    class Constant:
        num_classes = 2

        def __call__(self, x, t, y):  # eps that stands for x0 = 3 (class 0) or -1 (class 1)
            a, s = Schedule().coefficients(500)
            return (x - a * torch.tensor([3.0, -1.0])[y][:, None, None, None]) / s

    denoise = mixed_denoiser(Constant(), Schedule(), "eps", torch.tensor([[0, 1]]), [0.5, 0.5])
    x0 = denoise(torch.zeros(1, 1, 2, 2), torch.tensor([500]))
    assert (x0 - 1.0).abs().max() < 1e-4  # clipping first would give 0


def test_one_network_call_a_step_for_all_classes():
    schedule = Schedule()
    model = GaussianModel(schedule)
    draw(model, schedule, [0, 1], [0.5, 0.5], n=5, steps=7)
    assert model.batches == [10] * 7
    model = GaussianModel(schedule)
    draw(model, schedule, [0, 1], [0.5, 0.5], n=5, steps=7, guidance=2.0)
    assert model.batches == [15] * 7


def test_guidance_moves_away_from_the_null_class(unet):
    schedule, x, t = Schedule(), torch.randn(2, 1, 8, 8), torch.tensor([400, 400])
    y = torch.tensor([[0, 1]] * 2)

    def x0(columns, lam, **kw):
        return mixed_denoiser(unet, schedule, "v", columns, lam, clip=False, **kw)(x, t)

    null = x0(torch.full((2, 1), unet.num_classes), [1.0])
    mixed = x0(y, [0.5, 0.5])
    assert (x0(y, [0.5, 0.5], guidance=3.0) - (null + 3 * (mixed - null))).abs().max() < 1e-5
    assert (x0(y, [0.5, 0.5], guidance=0.0) - null).abs().max() < 1e-5


def test_noise_depends_on_seed_classes_and_index_alone():
    def noise(*key):
        return image_noise(*key)(5)

    base = noise(0, ("a", "b"), 3)
    assert torch.equal(base, noise(0, ("a", "b"), 3))
    for other in ((1, ("a", "b"), 3), (0, ("b", "a"), 3), (0, ("a", "b"), 4), (0, ("ab",), 3)):
        assert not torch.equal(base, noise(*other))


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9, 1.0])
def test_images_of_a_mix_share_a_part_of_their_noise(rho):
    """Unit variance whatever rho is; correlation rho within a mix, at every draw, and none between mixes."""
    a, b, c = (image_noise(0, *key, rho) for key in ((("a", "b"), 0), (("a", "b"), 1), (("a", "c"), 0)))
    for _ in range(3):
        found = np.cov([draw(20_000).numpy() for draw in (a, b, c)])
        assert np.abs(found - [[1, rho, 0], [rho, 1, 0], [0, 0, 1]]).max() < 0.04
    assert torch.equal(image_noise(0, ("a",), 1, rho)(5), image_noise(0, ("a",), 1)(5)) == (rho == 0)


def test_the_classes_of_a_mix_take_turns_to_start_it():
    """Every file of a class once before any twice; a function of seed and mix alone; other mixes, another order."""
    files = [[f"a{i}" for i in range(6)], [f"b{i}" for i in range(4)]]
    found = [sample_scoremix.start_image(0, ("a", "b"), i, files) for i in range(16)]
    assert sorted(found[0:12:2]) == files[0] and sorted(found[1:8:2]) == files[1] == sorted(found[9:16:2])
    assert found == [sample_scoremix.start_image(0, ("a", "b"), i, files) for i in range(16)]
    for seed, mix in ((1, ("a", "b")), (0, ("a", "c"))):
        assert found != [sample_scoremix.start_image(seed, mix, i, files) for i in range(16)]


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_a_start_is_the_image_with_noise_of_its_level(solver):
    """The denoiser first sees a x + s n of the level asked for; a start above the schedule changes no time."""
    schedule, seen = Schedule(), []
    times = timesteps(schedule, solver, 4, 3.0)
    a, s = schedule.coefficients(times[0])
    assert s / a == pytest.approx(3, rel=0.01) and len(times) == 5 and times[-1] == -1
    assert timesteps(schedule, solver, 4, 1e9) == timesteps(schedule, solver, 4)

    def denoise(x, t):
        seen.append(x)
        return torch.zeros_like(x)

    x, keys = torch.rand(2, 3, 8, 8) * 2 - 1, [(("a", "b"), 0), (("a", "b"), 1)]
    sample_scoremix.draw_images(denoise, keys, 0, (3, 8, 8), "cpu", schedule, solver, 4, 0.0, times, start=x)
    noise = draw_noise([image_noise(0, *k) for k in keys], (3, 8, 8), "cpu")
    assert (seen[0] - (a * x + s * noise)).abs().max() < 1e-5


def test_folder_names_keep_mixes_apart():
    assert folder_name(("a",)) == "a" and folder_name(("a+b",)) == "a+b"
    assert folder_name(("a", "b")) == "a+b"
    names = [
        folder_name(m)
        for m in (("a+b", "c"), ("a", "b+c"), ("a%2Bb", "c"), ("x" * 150, "y" * 150), ("x" * 150, "y" * 149))
    ]
    assert len(set(names)) == 5 and all(len(n) < 256 and n.count("+") <= 1 for n in names)
