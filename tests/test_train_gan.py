import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_graphs import Emulated
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from cxr import CxrError, checkpoints, classifier, datasets, graphs, losses, train_gan, training
from cxr.classifier import to_tensor
from cxr.data import identity
from cxr.train_gan import Config, Trainer

ROOT = Path(__file__).parent.parent


def trainer(xrays, own_classifier, folder, **options):
    spec = f"{own_classifier}:bright"
    options = {"preset": "tiny", "batch": 16, "device": "cpu"} | options
    config = Config(data=str(xrays), classifier=spec, **options)
    model = checkpoints.load_classifier(spec, 32)
    world = training.World(torch.device("cpu"))
    data = train_gan.open_data(config, model)
    folder.mkdir(exist_ok=True)
    run = training.Run(folder, config, data, False, world)
    return Trainer(config, data, model, torch.device("cpu"), world, run)


def draw(gan, step):
    return gan.draws((step, gan.progress["p"]))


@pytest.fixture
def gan(xrays, own_classifier, tmp_path):
    return trainer(xrays, own_classifier, tmp_path / "run", batch=16)


def test_doses_are_the_classifiers_response_between_two_quantiles(gan):
    low, high = gan.model.info["logits"]
    healthy = gan.doses[gan.data.labels == 0]
    diseased = gan.doses[gan.data.labels == 1]
    assert low < 0 < high
    assert (healthy == 0).all()
    assert diseased.min() >= 0 and diseased.max() == 1
    assert 0.3 < np.median(diseased) < 1


def test_patients_held_out_by_the_classifier_are_not_trained_on_unsaid(
    xrays, own_classifier, capsys
):
    config = Config(data=str(xrays), classifier=f"{own_classifier}:bright", preset="tiny")
    model = checkpoints.load_classifier(config.classifier, 32)
    data = datasets.open_dataset(xrays, 32)
    for splits, warned in ((data.splits, False), (data.splits[::-1], True)):
        then = dataclasses.replace(data, splits=splits)
        options = {"patient_pattern": "(.)x", "leave_out": None}
        provenance = {"digests": identity.of_data(then), "classifier": options}
        model.info["provenance"] = {"data": "another name", **provenance}
        train_gan.open_data(config, model)
        said = " ".join(capsys.readouterr().err.split())
        assert ("was split otherwise" in said) == warned
        assert ("(then: --patient-pattern (.)x)" in said) == warned


def test_a_run_may_start_from_another_models_weights(xrays, own_classifier, model_file, tmp_path):
    gan = trainer(xrays, own_classifier, tmp_path / "run", batch=16, start=str(model_file))
    begun = checkpoints.load_model(model_file)
    for network in (gan.G, gan.G_ema):
        assert torch.equal(network.const, begun.generator.const)
    assert torch.equal(gan.D.stem_bias, begun.discriminator.stem_bias)
    assert torch.equal(gan.D.hidden.weight, begun.discriminator.hidden.weight)


def test_random_structures_are_those_found_in_mean_and_principal_components(gan):
    gan.fit_structures(gan.G, gan.E)
    rows = datasets.balanced_batch(gan.classes, 1024, gan.config.seed, 0)
    with torch.no_grad(), gan.precision:
        parts = to_tensor(gan.data.images[rows], gan.device).split(64)
        w1 = torch.cat([gan.E(part)[0] for part in parts])
    structure, n = gan.G.structure, len(gan.G.structure.components)
    torch.testing.assert_close(structure.mean, w1.mean(0), atol=1e-5, rtol=1e-4)
    variances = torch.linalg.eigvalsh(torch.cov(w1.flatten(1).T.double()))[-n:].flip(0)
    sizes = structure.components.flatten(1).square().sum(1).double()
    torch.testing.assert_close(sizes, variances, atol=1e-6, rtol=1e-3)


def test_the_classifier_is_asked_once_for_each_training_image(gan):
    expected = classifier.predict(gan.classifier, gan.data.images, gan.device)
    np.testing.assert_allclose(gan.logits, expected.clip(*gan.model.info["logits"]), atol=1e-6)
    batch = draw(gan, 0)
    fakes = gan.generate(batch)
    answers = gan.classifier(fakes.originals).clamp(*gan.model.info["logits"])
    torch.testing.assert_close(fakes.original_logits, answers, atol=1e-4, rtol=0)


def test_fakes_come_in_pairs_of_one_structure_at_dose_zero_and_above(gan):
    batch = draw(gan, 0)
    fakes = gan.generate(batch)
    healthy, diseased = fakes.doses.chunk(2)
    assert (healthy == 0).all() and (diseased >= 0).all() and (diseased <= 1 + 1e-6).all()
    assert len(fakes.w1) == 8 and fakes.images.shape == (16, 1, 32, 32)
    assert batch.real_doses[:8].eq(0).all() and batch.real_doses[8:].gt(0).any()
    assert fakes.reconstructions.shape == fakes.originals.shape == (8, 1, 32, 32)


def test_half_of_the_structures_are_those_found_in_real_images(gan):
    fakes = gan.generate(draw(gan, 0))
    found, _ = gan.E(fakes.originals)
    found = found.unflatten(0, (-1, 2))[::2].flatten(0, 1)
    torch.testing.assert_close(fakes.w1[4:].float(), found.float(), atol=0.02, rtol=0.02)


def test_diseased_lungs_keep_the_disease_found_with_them_healthy_ones_get_another(gan):
    batch = draw(gan, 0)
    fakes = gan.generate(batch)
    _, found = gan.E(fakes.originals[[1, 5]])  # every second pair is kept
    torch.testing.assert_close(fakes.z2[[13, 15]].float(), found.float(), atol=0.02, rtol=0.02)
    assert torch.equal(fakes.z2[[12, 14]], batch.z2[[4, 6]])


def test_half_of_the_drawn_doses_are_those_of_diseased_images(gan):
    doses = torch.cat([draw(gan, step).z2.norm(dim=1) for step in range(20)]).view(-1, 4)
    real = torch.from_numpy(gan.doses)
    known = (doses[..., None] - real).abs().amin(2) < 1e-6
    assert known[:, 1:3].all() and not known[:, [0, 3]].any()


def test_r1_is_the_squared_gradient(gan):
    class Quadratic(torch.nn.Module):
        def forward(self, x, doses):
            return 1.5 * x.square().sum((1, 2, 3))

    x = torch.randn(4, 1, 8, 8)
    expected = (3 * x).square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(losses.r1(Quadratic(), x, torch.zeros(4)), expected)


def test_the_default_batch_fits_the_memory(monkeypatch):
    def of(gigabytes, size):
        gpu = type("GPU", (), {"total_memory": gigabytes * 1e9})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
        return train_gan.fitting(size, torch.device("cuda"))

    assert train_gan.fitting(128, torch.device("cpu")) == 16
    assert [of(n, 128) for n in (80, 16, 12, 6)] == [64, 64, 32, 16]
    assert [of(n, 256) for n in (80, 40, 24)] == [64, 32, 16]


def test_augmentation_grows_while_the_discriminator_is_too_sure(gan):
    for _ in range(200):
        gan.adaptive.see(torch.tensor(1.0))
    grown = gan.adaptive.p.item()
    assert grown > 0
    gan.progress["images"] = train_gan.ADAPT_EVERY // 2 * gan.config.batch
    gan.step()
    assert (gan.progress["p"], gan.progress["next_p"]) == (0.0, grown)
    gan.progress["images"] = train_gan.ADAPT_EVERY * gan.config.batch
    gan.step()
    assert gan.progress["p"] == grown
    for _ in range(400):
        gan.adaptive.see(torch.tensor(0.0))
    assert gan.adaptive.p.item() < grown


def test_a_step_moves_all_three_networks_and_not_the_classifier(gan):
    before = {name: [p.clone() for p in getattr(gan, name).parameters()] for name in "GED"}
    terms = gan.step()
    for name in "GED":
        moved = [
            not torch.equal(a, b) for a, b in zip(before[name], getattr(gan, name).parameters())
        ]
        assert np.mean(moved) > 0.7, name
    assert all(value.isfinite() for value in terms.values())
    assert {"D", "G", "r1", "response", "latent", "image"} <= terms.keys()


class Silent(TorchDispatchMode):
    """Refuses what a CUDA graph cannot record: values that are read back, and tensors made from
    Python's numbers, which would be copied to the GPU."""

    REFUSED = ("_local_scalar_dense", "lift_fresh", "nonzero", "is_nonzero", "masked_select")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        assert name not in self.REFUSED, name
        return function(*args, **(kwargs or {}))


def fused(gan):
    """The trainer with optimisers that read nothing back, as on a GPU."""
    gan.opt_G = torch.optim.Adam(gan.G.parameters(), 2e-3, betas=(0.0, 0.99), fused=True)
    gan.opt_E = torch.optim.AdamW(gan.E.parameters(), 5e-4, betas=(0.9, 0.99), fused=True)
    gan.opt_D = torch.optim.Adam(gan.D.parameters(), 2e-3, betas=(0.0, 0.99), fused=True)
    return gan


@pytest.mark.parametrize("penalised", [False, True])
def test_the_work_of_a_step_reads_no_value_back(gan, penalised):
    gan.adaptive.p.fill_(0.5)
    fused(gan).step()
    batch = draw(gan, 1)
    with Silent():
        terms = gan.work(batch, penalised)
    assert ("r1" in terms) is penalised
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Silent():
        terms["D"].item()


def traced(recorded, kind):
    """A replay of the operations on tensors alone, in the memory of now: what a CUDA graph does."""
    leaves, form = tree_flatten(recorded.static)
    trainer = recorded.work.__self__
    before = {k: v.clone() for k, v in checkpoints.pack(trainer.parts()).items()}
    graph = make_fx(lambda *batch: recorded.work(tree_unflatten(batch, form), kind))(*leaves)
    for name, value in checkpoints.pack(trainer.parts()).items():
        value.copy_(before[name])  # unlike a CUDA graph's, this recording runs
    return lambda: graph(*leaves)


def test_recorded_steps_are_the_steps(xrays, own_classifier, tmp_path, monkeypatch):
    """Both graphs, with and without R1, replayed from the tensors alone: the weights are, bit for
    bit, those of the same steps run by Python."""
    monkeypatch.setattr(graphs, "WARM_UP", 2)
    asked = xrays, own_classifier
    plain, other = (fused(trainer(*asked, tmp_path / name, batch=16, r1_every=4)) for name in "ab")
    other.recorded = Emulated(other.work, traced)
    for gan in (plain, other):
        gan.adaptive.p.fill_(0.3)
        terms = [gan.step() for _ in range(10)]
    assert set(other.recorded.replays) == {False, True} and "r1" in terms[8]
    one, two = (checkpoints.pack(gan.parts()) for gan in (plain, other))
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_a_collapsed_generator_stops_the_run(gan):
    with torch.no_grad():
        for layer in gan.G_ema.layers:
            if layer.image_weight is not None:
                layer.image_weight.zero_()
    with pytest.raises(CxrError, match="collapsed"):
        gan.report()


def test_a_classifier_that_cannot_tell_is_refused(xrays, own_classifier, tmp_path):
    own = tmp_path / "flat.py"
    own.write_text(own_classifier.read_text().replace("20 *", "0.01 *"))
    with pytest.raises(CxrError, match="hardly tells the classes apart"):
        trainer(xrays, own, tmp_path / "run")


def test_two_processes_give_the_gradients_of_one(xrays, own_classifier, tmp_path):
    """On one global batch in fp32, R1 among the losses: each network's gradient, to 1e-5 of
    its length."""
    script = tmp_path / "gradients.py"
    script.write_text(f"""
import sys
import torch
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from cxr import train_gan
from test_train_gan import trainer
train_gan.half_precision = lambda device: torch.autocast("cpu", enabled=False)
torch.set_num_threads(1)
gan = trainer(Path({str(xrays)!r}), Path({str(own_classifier)!r}), Path(sys.argv[1]), batch=32, rate=0.0)
gan.adaptive.p.fill_(0.6)
gan.step()
gradients = {{f"{{n}}.{{k}}": p.grad for n in "GED" for k, p in getattr(gan, n).named_parameters()}}
if gan.world.first:
    torch.save(gradients, sys.argv[1] + ".pt")
gan.world.close()
""")
    launch = {"one": [], "two": ["-m", "torch.distributed.run", "--nproc-per-node", "2"]}
    gradients = {}
    for name, arguments in launch.items():
        command = [sys.executable, *arguments, str(script), str(tmp_path / name)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        gradients[name] = torch.load(tmp_path / f"{name}.pt")
    for name in "GED":
        one, two = (
            torch.cat([g.flatten() for key, g in gradients[n].items() if key[0] == name])
            for n in ("one", "two")
        )
        assert one.norm() > 0.01
        assert (one - two).norm() / one.norm() < 1e-5, name
