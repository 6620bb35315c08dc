"""Dense CRF, permutohedral lattice and dense energy against pydensecrf, double loops and gradcheck."""
import numpy as np
import pytest
import torch
from PIL import Image
from torch.autograd.gradcheck import GradcheckError

import common
from common import CRF, ExactFilter, PermutohedralLattice, dense_crf, dense_energy, label_probs, mean_field
from data import REVEALS, derive, draw_scene

SETS = {"psa": CRF(3, 3, 80, 13, 10, 10), "irn": CRF(3, 3, 50, 5, 10, 10), "gnn": CRF(2, 3, 50, 5, 10, 10),
        "rrm": CRF(3, 3, 83, 5, 4, 10), "deeplab": CRF(1, 3, 67, 3, 4, 10), "lpg": CRF(3, 3, 140, 5, 5, 10),
        "cian": CRF(3, 3, 80, 13, 10, 5)}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def soft_probs(mask, classes, seed, grain=8):
    """Coarse noisy class probabilities as a network gives them: soft enough for a CRF to change them."""
    rng = np.random.default_rng(seed)
    one_hot = np.eye(classes)[mask][grain // 2::grain, grain // 2::grain]
    logits = torch.from_numpy(2 * one_hot + rng.normal(0, 1.2, one_hot.shape)).permute(2, 0, 1)[None]
    logits = torch.nn.functional.interpolate(logits.float(), mask.shape, mode="bilinear")[0]
    return logits.softmax(0).numpy()


def local_mask(mask):
    """Classes 0..n-1 in place of those that are there; 255 becomes background."""
    return np.unique(np.where(mask == 255, 0, mask), return_inverse=True)[1].reshape(mask.shape)


def scene(index):
    sample = derive(draw_scene(0, "val", index), REVEALS["full"])
    mask = local_mask(sample.mask)
    return sample.image, soft_probs(mask, mask.max() + 1, index, grain=4)


def photographs(data, n):
    folder = data / "VOC2012"
    names = (folder / "ImageSets" / "Segmentation" / "val.txt").read_text().split()[:n]
    for i, name in enumerate(names):
        mask = local_mask(np.array(Image.open(folder / "SegmentationClass" / f"{name}.png")))
        image = np.array(Image.open(folder / "JPEGImages" / f"{name}.jpg").convert("RGB"))
        yield image, soft_probs(mask, mask.max() + 1, i)


def compare(cases, crf):
    """Share of equal labels, the same where the reference changed the label, share it changed, mean |dQ|."""
    images, probs = zip(*cases)
    ours, theirs = dense_crf(images, probs, crf), dense_crf(images, probs, crf, "pydensecrf")
    labels = [np.concatenate([q.argmax(0).ravel() for q in qs]) for qs in (ours, theirs, probs)]
    same, changed = labels[0] == labels[1], labels[1] != labels[2]
    gap = np.mean([np.abs(a - b).mean() for a, b in zip(ours, theirs)])
    return same.mean(), same[changed].mean(), changed.mean(), gap


@pytest.mark.parametrize("name", SETS)
def test_labels_of_pydensecrf_on_shapes(name):
    same, same_changed, changed, gap = compare([scene(i) for i in range(4)], SETS[name])
    assert changed >= 0.03, "too easy: an identity would pass"
    assert same >= 0.999 and same_changed >= 0.99 and gap < 1e-4


@pytest.mark.parametrize("name", SETS)
def test_labels_of_pydensecrf_on_photographs(name, pictures):
    same, same_changed, changed, gap = compare(photographs(pictures, 2), SETS[name])
    assert changed >= 0.03, "too easy: an identity would pass"
    assert same >= 0.999 and same_changed >= 0.99 and gap < 1e-4


def test_a_batch_equals_its_images_and_a_stack_its_unaries():
    (a, p), (b, q) = scene(0), scene(1)
    image, prob = a[:33, :47], p[:, :33, :47]
    alone = dense_crf([a, b, image], [p, q, prob], SETS["psa"])
    batch = mean_field([a, b, image], [p[None], q[None], prob[None]], SETS["psa"])
    assert all(np.array_equal(x, y[0]) for x, y in zip(alone, batch))
    again = dense_crf([a, b, image], [p, q, prob], SETS["psa"])
    assert all(np.array_equal(x, y) for x, y in zip(alone, again))
    stack = np.stack([p, p[::-1].copy()])
    together = dense_crf([a], [stack], SETS["psa"])[0]
    for x, y in zip(together, stack):
        assert np.allclose(x, dense_crf([a], [y], SETS["psa"])[0], atol=1e-6)
    assert np.allclose(dense_crf([a], [stack], SETS["psa"], "pydensecrf")[0], together, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (33, 47)])
@pytest.mark.parametrize("kind", ["uint8", "float", "strided", "constant"])
def test_odd_inputs(size, kind):
    image, prob = (x[..., :size[0], :size[1]] if i else x[:size[0], :size[1]] for i, x in enumerate(scene(2)))
    if kind == "float":
        image = image.astype(np.float64)
    elif kind == "constant":
        image = np.full_like(image, 77)
    elif kind == "strided":
        image, prob = image[::-1, ::-1], prob[:, ::-1, ::-1]
    before = prob.copy()
    (ours,) = dense_crf([image], [prob], SETS["psa"])
    (theirs,) = dense_crf([image], [prob], SETS["psa"], "pydensecrf")
    assert np.array_equal(prob, before), "the caller's array must stay as it is"
    assert ours.dtype == np.float32 and np.allclose(ours, theirs, atol=1e-4)
    assert np.allclose(ours.sum(0), 1, atol=1e-5)


def test_unaries_from_labels_are_those_of_pydensecrf():
    from pydensecrf.utils import unary_from_labels
    label = np.array([[0, 1, 2], [255, 2, 0]])
    zero_unsure = np.where(label == 255, 0, label + 1)
    expected = np.exp(-unary_from_labels(zero_unsure, 3, 0.7, zero_unsure=True)).reshape(3, 2, 3)
    assert np.allclose(label_probs(label, 3), expected, atol=1e-6)


def test_strong_weights_do_not_overflow():
    image, prob = scene(3)
    (ours,) = dense_crf([image], [prob], CRF(3, 60, 80, 13, 200, 5))
    assert np.isfinite(ours).all() and np.allclose(ours.sum(0), 1, atol=1e-5)


# ---------------------------------------------------------------- lattice


def brute_force(f, x):
    """The kernel as a double loop would have it."""
    return torch.exp(-torch.cdist(f, f).square() / 2) @ x


def picture_features(size, sigma_xy, sigma_rgb, dtype=torch.float64):
    image = torch.from_numpy(np.ascontiguousarray(scene(0)[0][:size, :size])).reshape(-1, 3).to(dtype)
    place, _ = common.pixel_features([(size, size)], sigma_xy, dtype=dtype)
    return torch.cat([place, image / sigma_rgb], dim=1)


def test_lattice_scale_and_normalised_error():
    """The lattice's sums are 35 to 50 % low, as in the reference: nobody shall mend that."""
    f = picture_features(40, 80, 13)
    x = torch.rand(len(f), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact, lattice = brute_force(f, x), PermutohedralLattice(f)
    raw = lattice.filter(x)
    assert 0.5 < (raw * exact).sum() / exact.square().sum() < 0.65
    n = brute_force(f, torch.ones_like(x[:, :1])).rsqrt()
    expected, got = n * brute_force(f, n * x), lattice.normalise().filter(x)
    assert (got - expected).abs().mean() / expected.abs().mean() < 0.05


def test_lattice_in_the_plane_is_close_to_the_gaussian():
    f, _ = common.pixel_features([(24, 30)], 3, dtype=torch.float64)
    x = torch.rand(len(f), 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ratio = PermutohedralLattice(f).filter(x).sum() / brute_force(f, x).sum()
    assert 0.8 < ratio < 1


@pytest.mark.parametrize("d", [2, 5])
def test_transposed_filter(d):
    g = torch.Generator().manual_seed(d)
    f = 3 * torch.rand(300, d, generator=g, dtype=torch.float64)
    x, y = torch.rand(2, 300, 4, generator=g, dtype=torch.float64)
    for lattice in (PermutohedralLattice(f), PermutohedralLattice(f).normalise()):
        assert torch.allclose((lattice.filter(x) * y).sum(), (x * lattice.filter(y, transpose=True)).sum())
    assert not torch.allclose(lattice.filter(x), lattice.filter(x, transpose=True), rtol=1e-4), "no test"


def test_images_never_mix_and_bags_only_reorder_sums():
    g = torch.Generator().manual_seed(0)
    f, x = 2 * torch.rand(200, 5, generator=g), torch.rand(200, 3, generator=g)
    image = torch.arange(200) % 2
    both = PermutohedralLattice(f, image).filter(x)
    for i in (0, 1):
        alone = PermutohedralLattice(f[image == i]).filter(x[image == i])
        assert torch.equal(both[image == i], alone)
    whole, bags = PermutohedralLattice(f), PermutohedralLattice(f, bag=3)
    assert torch.allclose(whole.filter(x), bags.filter(x), rtol=1e-5)
    assert torch.allclose(whole.filter(x, True), bags.filter(x, True), rtol=1e-5)
    assert len(bags.splat) > len(whole.splat), "no bag was split"


def test_long_keys():
    """Sorted as 32 bits where they fit, as 64 where not, refused beyond: a far point changes nothing."""
    f = torch.rand(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.rand(51, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    near = PermutohedralLattice(f).filter(x[:50])
    far = PermutohedralLattice(torch.cat([f, torch.full((1, 5), 300.0)])).filter(x)
    assert torch.allclose(near, far[:50])
    with pytest.raises(ValueError, match="2\\^63"):
        PermutohedralLattice(torch.cat([f, torch.full((1, 5), 1e5)]))


def test_exact_filter_is_the_double_loop():
    f = picture_features(14, 5, 20)
    x = torch.rand(len(f), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(ExactFilter(f).filter(x), brute_force(f, x), rtol=1e-9)
    assert torch.allclose(ExactFilter(f.float()).filter(x.float()), brute_force(f, x).float(), rtol=1e-3)


# ---------------------------------------------------------------- dense energy


def energy_case(size=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = 255 * torch.rand(2, 3, size, size, generator=g, dtype=torch.float64)
    logits = torch.rand(2, 3, size, size, generator=g, dtype=torch.float64, requires_grad=True)
    return images, logits


def energy_by_hand(images, probs, sigma_rgb, sigma_xy, gate):
    """Eqs. (2.17)-(2.20) of RRM as four loops, without 1/W and with i = j."""
    total, (B, _, H, W) = 0, probs.shape
    pixels = list(np.ndindex(H, W))
    for b in range(B):
        for i in pixels:
            for j in pixels:
                apart = (i[0] - j[0]) ** 2 + (i[1] - j[1]) ** 2
                colour = ((images[b, :, i[0], i[1]] - images[b, :, j[0], j[1]]) ** 2).sum()
                G = np.exp(-apart / (2 * sigma_xy**2) - colour / (2 * sigma_rgb**2))
                p, q = probs[b, :, i[0], i[1]], probs[b, :, j[0], j[1]]
                total += gate[b, i[0], i[1]] * G * (p * (1 - q)).sum()
    return total / B


def test_exact_energy_is_the_equation():
    images, logits = energy_case(5)
    probs, gate = logits.detach().softmax(1), torch.rand(2, 5, 5, dtype=torch.float64)
    for g in (None, gate):
        weight = np.ones((2, 5, 5)) if g is None else g.numpy()
        expected = energy_by_hand(images.numpy(), probs.numpy(), 60, 3, weight)
        value = dense_energy(images, probs, 60, 3, gate=g, exact=True)
        assert value.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("exact", [False, True])
def test_energy_gradient(exact):
    images, logits = energy_case()
    def energy(p):
        return dense_energy(images, p, 40, 4, exact=exact)

    assert torch.autograd.gradcheck(energy, (logits,))
    assert torch.autograd.gradcheck(lambda p: energy(p.softmax(1)), (logits,))
    with pytest.MonkeyPatch.context() as patch:                 # and it needs the transposed filter
        if not exact:
            forward = PermutohedralLattice.filter
            patch.setattr(PermutohedralLattice, "filter", lambda self, x, transpose=False: forward(self, x))
            with pytest.raises(GradcheckError):
                torch.autograd.gradcheck(energy, (logits,))


def test_gated_energy_has_the_gradient_of_rrm():
    images, logits = energy_case()
    probs = logits.detach().softmax(1).requires_grad_()
    gate = torch.rand(2, 7, 7, dtype=torch.float64)
    value = dense_energy(images, probs, 40, 4, gate=gate)
    value.backward()
    for b in range(2):
        place, _ = common.pixel_features([(7, 7)], 4, dtype=torch.float64)
        f = torch.cat([place, images[b].flatten(1).T / 40], dim=1)
        P = probs[b].detach().flatten(1).T
        KP = PermutohedralLattice(f).filter(P.contiguous())
        expected = -2 * gate[b].reshape(-1, 1) * KP / 2                                 # mean of two images
        assert torch.allclose(probs.grad[b].flatten(1).T, expected)
    assert value > 0


def test_padding_takes_no_part():
    images, logits = energy_case()
    probs = logits.detach().softmax(1)
    valid = torch.zeros(2, 7, 7, dtype=torch.bool)
    valid[:, :5, :6] = True
    crop = dense_energy(images[:, :, :5, :6], probs[:, :, :5, :6].contiguous(), 40, 4)
    assert torch.allclose(dense_energy(images, probs, 40, 4, valid=valid), crop)
    assert not torch.allclose(dense_energy(images, probs, 40, 4), crop)
    assert dense_energy(images, probs, 40, 4, valid=torch.zeros_like(valid)) == 0


def test_energy_refuses():
    images, logits = energy_case()
    with pytest.raises(ValueError, match="images"):
        dense_energy(images[:, :, 1:], logits, 40, 4)
    with pytest.raises(ValueError, match="NaN"):
        dense_energy(images, logits * torch.nan, 40, 4)


def test_certain_probabilities_have_little_energy_and_noise_much():
    image, prob = scene(0)
    images = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    sharp = torch.from_numpy(np.eye(len(prob), dtype=np.float32)[prob.argmax(0)]).permute(2, 0, 1)[None]
    shuffled = sharp.flatten(2)[:, :, torch.randperm(sharp[0, 0].numel())].view_as(sharp)
    energy = [dense_energy(images, p, 15, 50).item() for p in (torch.zeros_like(sharp), sharp, shuffled)]
    assert energy[0] == 0 < energy[1] < 0.5 * energy[2]
