"""Muon: what it does to a matrix, torch's own beside it, what it leaves to AdamW, skipped steps, resuming."""

import pytest
import torch as th
from in_process import script_here
from tiny import distillation, one_line_error, script
from torch import nn

from guided_diffusion.training.muon import Muon, matrices, orthogonalized
from guided_diffusion.training.optimizer import load_optimizer_state


@pytest.mark.parametrize("dtype", [th.float32, th.bfloat16, th.float16])
@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 4, 36), (1, 36, 4), (3, 6, 27)])
def test_singular_values_become_about_one_and_the_vectors_stay(shape, dtype):
    th.manual_seed(0)
    x = th.randn(shape) * 100
    u, _, v = th.linalg.svd(x, full_matrices=False)
    found = orthogonalized(x, dtype)
    assert found.dtype == th.float32
    turned = u.mT @ found @ v.mT
    values = turned.diagonal(dim1=-2, dim2=-1)
    assert bool(((values > 0.6) & (values < 1.3)).all())
    rounding = 1e-3 + 16 * th.finfo(dtype).eps  # of x, times its condition
    th.testing.assert_close(turned, th.diag_embed(values), atol=rounding, rtol=0)
    assert th.equal(orthogonalized(th.zeros(shape)), th.zeros(shape))


def test_torchs_own_moves_a_matrix_alike(monkeypatch):
    """torch's computes the orthogonalised gradient in bfloat16, here in float32."""
    monkeypatch.setattr(th.Tensor, "bfloat16", th.Tensor.float)
    th.manual_seed(0)
    start, settings = th.randn(6, 20), {"lr": 0.1, "weight_decay": 0.01}
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [
        Muon([ours], [ours], **settings),
        th.optim.Muon([theirs], **settings, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(5):
        gradient = th.randn(6, 20)
        ours.grad, theirs.grad = gradient, gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    th.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert ours.grad is gradient  # as the loop found it


def test_a_convolution_is_a_matrix_and_the_memory_layout_does_not_matter():
    th.manual_seed(0)
    start, gradients = th.randn(6, 4, 3, 3), th.randn(3, 6, 4, 3, 3)
    ends = []
    for shape, layout in (((6, 36), None), ((6, 4, 3, 3), None), ((6, 4, 3, 3), th.channels_last)):
        weight = nn.Parameter(start.reshape(shape).clone(memory_format=layout or th.contiguous_format))
        optimizer = Muon([weight], [weight], lr=0.1)
        for gradient in gradients:
            weight.grad = gradient.reshape(shape).contiguous(memory_format=layout or th.contiguous_format)
            optimizer.step()
        assert layout is None or weight.is_contiguous(memory_format=layout)
        ends.append(weight.detach().reshape(6, 36))
    assert th.equal(ends[0], ends[1])
    th.testing.assert_close(ends[0], ends[2])


def small_network():
    th.manual_seed(0)
    layers = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(2, 1)
    return nn.Sequential(nn.Embedding(5, 4), *layers)


def steps_of(network, optimizer, count, seed=0, spoilt=None):
    """Some steps on random gradients; `spoilt` counts one that holds a NaN and is to be skipped."""
    th.manual_seed(seed)
    for number in range(count):
        for p in network.parameters():
            p.grad = th.randn_like(p)
        if number == spoilt:
            network[3].weight.grad[0, 0] = th.nan
        optimizer.found_inf = th.tensor(float(number == spoilt))
        optimizer.step()


def muon(network, **more):
    return Muon(network.parameters(), matrices(network), lr=0.1, weight_decay=0.01, **more)


def test_vectors_and_embedding_tables_are_adamws():
    ours, theirs = small_network(), small_network()
    assert [tuple(p.shape) for p in matrices(ours)] == [(6, 4), (6, 6), (2, 6)]
    steps_of(ours, muon(ours), 3)
    steps_of(theirs, th.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.01, fused=True), 3)
    for name, p in ours.named_parameters():
        other = theirs.get_parameter(name)
        same = p.ndim == 1 or name in ("0.weight", "5.weight")  # the table, and a single row
        assert th.equal(p, other) if same else not th.allclose(p, other, atol=0.05), name


def test_the_learning_rate_may_lie_on_the_device():
    """As on a GPU, where graphs read it."""
    ours, theirs = small_network(), small_network()
    steps_of(ours, muon(ours), 2)
    optimizer = muon(theirs)
    optimizer.param_groups[0]["lr"] = th.tensor(0.1, dtype=th.float64)
    steps_of(theirs, optimizer, 2)
    assert all(th.allclose(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_weight_without_a_gradient_stays():
    network = small_network()
    optimizer, before = muon(network), network[3].weight.detach().clone()
    network[1].weight.grad = th.randn(6, 4)
    optimizer.step()
    assert th.equal(network[3].weight, before) and network[3].weight not in optimizer.state


def test_a_skipped_step_changes_nothing():
    network = small_network()
    optimizer = muon(network)
    steps_of(network, optimizer, 2)
    before = [p.detach().clone() for p in network.parameters()]
    averages = [optimizer.state[p]["exp_avg"].clone() for p in network.parameters()]
    steps_of(network, optimizer, 1, spoilt=0)
    assert all(th.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    after = [optimizer.state[p]["exp_avg"] for p in network.parameters()]
    assert all(th.equal(a, b) for a, b in zip(averages, after, strict=True))


class TestItsState:
    def test_goes_on_exactly(self):
        straight, resumed = small_network(), small_network()
        steps_of(straight, optimizer := muon(straight), 2)
        steps_of(resumed, first := muon(resumed), 2)
        load_optimizer_state(second := muon(resumed), first.state_dict())
        steps_of(straight, optimizer, 2, seed=1)
        steps_of(resumed, second, 2, seed=1)
        assert all(th.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))

    def test_is_taken_from_adamws_but_not_the_other_way(self):
        network = small_network()
        adamw = th.optim.AdamW(network.parameters(), lr=0.1, fused=True)
        steps_of(network, adamw, 2)
        average = adamw.state[network[1].weight]["exp_avg"].clone()
        load_optimizer_state(ours := muon(network), adamw.state_dict())
        assert set(ours.state[network[1].weight]) == {"step", "exp_avg"}
        assert th.equal(ours.state[network[1].weight]["exp_avg"], average)
        steps_of(network, ours, 1)
        with pytest.raises(ValueError, match=r"it is Muon's: give run\.optimizer=muon"):
            load_optimizer_state(adamw, ours.state_dict())


def test_a_run_with_it(tmp_path):
    """Stopped and continued it ends with the same bits, and not with AdamW's; one line for what cannot be."""
    config = distillation(tmp_path, image_size=8, distill__role_vector=True)
    script_here("scripts/dynamic_prepare.py", "--config", config)
    flags = ["--config", config, "run.sample_interval=-1"]
    ends = {}
    for name, words in {
        "straight": ["run.optimizer=muon", "run.iterations=3"],
        "parted": ["run.optimizer=muon", "run.iterations=1"],
        "adamw": ["run.iterations=3"],
    }.items():
        run = tmp_path / name
        script_here("scripts/image_kd.py", *flags, *words, "--exp_dir", run)
        if name == "parted":
            refused = ["run.optimizer=adamw", "run.iterations=3"]
            done = script("scripts/image_kd.py", *flags, *refused, "--exp_dir", run, check=False)
            assert "give run.optimizer=muon" in one_line_error(done)
            script_here(
                "scripts/image_kd.py", *flags, "run.optimizer=muon", "run.iterations=3", "--exp_dir", run
            )
        ends[name] = th.load(run / "model000003.pt", weights_only=True)
    assert all(th.equal(ends["straight"][key], ends["parted"][key]) for key in ends["straight"])
    assert not all(th.equal(ends["straight"][key], ends["adamw"][key]) for key in ends["straight"])
    done = script("scripts/image_kd.py", *flags, "run.optimizer=sgd", "run.iterations=3", check=False)
    assert "run.optimizer" in one_line_error(done) and "muon" in one_line_error(done)
