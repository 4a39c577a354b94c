"""The recipes: what the published settings mean here."""

import dataclasses

import numpy as np
import pytest
import torch

import cli
import data
import orca
import pare
import recraft
from tasks import published


def test_averaged_gradients_with_our_settings_take_the_official_step():
    """The official code sums the gradients of 4 batches, with its learning rate and decay; we average with ours."""
    for optimizer, make in (("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        recipe = published.published(optimizer, 1e-2, 0.3, 8, 10, accumulate=4)
        w = [torch.tensor([1.0, -2.0], requires_grad=True) for _ in range(2)]
        official, ours = make([w[0]], lr=1e-2, weight_decay=0.3), make([w[1]], lr=recipe.lr, weight_decay=recipe.weight_decay)
        for _ in range(5):
            gradients = torch.randn(4, 2)
            w[0].grad, w[1].grad = gradients.sum(0), gradients.mean(0)
            official.step()
            ours.step()
        assert torch.allclose(w[0], w[1], atol=1e-6), optimizer


def test_recipes_name_a_source_of_their_modality():
    for name in [*data.TASKS, "openml31"]:
        task = data.find_task(name)
        for method in ("orca", "pare"):
            for scale in ("full", "tiny"):
                args = data.complete(pare.Args(task=name), method, scale)
                assert data.PROXIES[args.source].modality == task.modality
                assert method == "orca" or args.k_begin > 0
    args = data.complete(pare.Args(task="psicov"), "pare", "tiny")
    assert (args.batch_size, args.accumulate) == (4, 8)  # 32 samples would be 1.9 GB
    with pytest.raises(cli.UserError, match=r"conll2003 has another modality than cifar100.\nUse cifar10 or tiny_imagenet"):
        data.complete(pare.Args(task="cifar100", source="conll2003"), "pare", "tiny")


def test_an_epoch_is_a_number_of_steps_at_the_tiny_scale_and_a_pass_elsewhere():
    def batches(task, scale, origin="official", n=1000, **options):
        args = data.complete(orca.Args(task=task, scale=scale, **options), "orca", scale)
        classes = 10 if data.find_task(task).target == "class" else None
        return data.Split(np.zeros((n, 1)), np.zeros(n), classes, origin, data.find_task(task), "cpu").batches_in_epoch(args)

    assert batches("satellite", "full", batch_size=32) == 31  # what does not fill a batch is left out
    assert batches("satellite", "full", n=5, batch_size=32) == 1
    assert batches("satellite", "full", steps_per_epoch=7, batch_size=32, accumulate=3) == 21
    assert batches("satellite", "tiny") == batches("satellite", "tiny", n=9) == data.TINY_STEPS["series"]
    assert batches("satellite", "tiny", accumulate=4) == 4 * data.TINY_STEPS["series"]
    assert batches("satellite", "tiny", "toy", n=96, batch_size=32) == 3
    assert batches("satellite", "tiny", "toy", n=9600) == published.TOY_STEPS
    assert batches("satellite", "tiny", "toy", n=96, steps_per_epoch=5) == 5


def test_each_kind_of_task_has_its_tiny_recipe_the_same_for_every_method():
    assert (
        published.TINY_RECIPES.keys()
        == published.TINY_STEPS.keys()
        == {data.find_task(t).kind for t in [*data.TASKS, "openml31"]}
    )
    kinds = {"spherical": "images", "psicov": "2D fields", "satellite": "series", "deepsea": "series", "burgers1d": "1D fields"}
    assert all(data.TASKS[task].kind == kind for task, kind in kinds.items()) and data.find_task("openml31").kind == "tables"
    for task in data.TASKS:
        one, other = (dataclasses.asdict(data.complete(orca.Args(task=task), method, "tiny")) for method in ("orca", "pare"))
        assert {k for k in one if one[k] != other[k]} <= {"source"}, task
        assert one["lr"] == published.TINY_RECIPES[data.TASKS[task].kind].lr


def test_a_copy_of_pare_under_another_name_still_mixes():
    for task in ("spherical", "darcy", "satellite"):
        mine, orcas = data.complete(pare.Args(task=task), "mine", "tiny"), data.complete(orca.Args(task=task), "mine", "tiny")
        assert mine == data.complete(pare.Args(task=task), "pare", "tiny") and mine.k_begin > 0
        assert orcas == data.complete(orca.Args(task=task), "orca", "tiny")


def test_a_first_stage_has_the_published_rate_of_one_batch():
    for name, lr, decay in (("cifar100", 1e-4, 1e-3), ("ecg", 1e-6, 0.1), ("psicov", 5e-6, 1e-5)):  # hyperparameters.csv
        args = data.complete(orca.Args(task=name, scale="full"), "orca", "full")
        assert data.of_one_batch(args, "orca") == pytest.approx((lr, decay))
        halved = dataclasses.replace(args, accumulate=2 * args.accumulate)  # for memory
        assert data.of_one_batch(halved, "orca") == data.of_one_batch(args, "orca")
        twice = data.of_one_batch(dataclasses.replace(args, lr=2 * args.lr), "orca")  # a given rate is converted, too
        assert twice == pytest.approx((2 * lr, decay))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_optimizer_that_replaces_the_published_one_has_the_rate_that_is_given(optimizer):
    args = orca.Args(task="spherical", scale="full", optimizer=optimizer, lr=0.1, weight_decay=0.2)  # published: AdamW
    assert data.of_one_batch(data.complete(args, "orca", "full"), "orca") == (0.1, 0.2)
    for missing in ("lr", "weight_decay"):  # those of AdamW mean something else to it
        with pytest.raises(cli.UserError, match="spherical are those of adamw"):
            data.complete(dataclasses.replace(args, **{missing: None}), "orca", "full")


def test_recraft_aligns_as_released():
    found = {}
    for name in ("cifar100", "spherical", "psicov", "deepsea", "openml31"):
        args = data.complete(recraft.Args(task=name, scale="full"), "recraft", "full")
        found[name] = args.align_epochs, args.align_samples, args.batch_size
    assert found == {"cifar100": (60, 128, 32), "spherical": (60, 128, 28), "psicov": (60, 64, 1), "deepsea": (60, 64, 16),
                     "openml31": (20, 128, 64)}  # fmt: skip
    assert data.complete(recraft.Args(task="deepsea", scale="tiny"), "recraft", "tiny").align_epochs == 20
    of = {name: recipes.get("recraft", recipes["orca"]) for name, recipes in published.RECIPES.items()}
    labels = {name: (recipe.label_samples, recipe.label_epochs) for name, recipe in of.items()}
    assert labels["cifar100"] == (16, 5) and labels["spherical"] == (16, 3) and labels["satellite"] == (32, 3)
    assert labels["darcy"] == (20, 5) and labels["advection1d"] == (28, 4)


def test_the_weight_of_the_mixed_loss_is_that_of_the_kind_of_task():
    weights = {name: data.TASKS[name].recipes["pare"].mix_weight for name in ("cifar100", "darcy", "cosmic", "satellite")}
    assert weights == {"cifar100": 1, "darcy": 0.3, "cosmic": 0.3, "satellite": 0.1}


def test_a_shorter_run_has_the_same_learning_rate_curve_squeezed():
    full = data.complete(pare.Args(), "pare", "full")
    assert (full.epochs, full.batch_size, full.accumulate, full.lr, full.decay_epochs) == (60, 16, 8, 1e-4, 60)
    assert full.source == "tiny_imagenet" and round(full.k_begin * 3136) == 2000 and full.k_end == 0
    sgd = data.complete(pare.Args(task="cifar100"), "pare", "full")
    summed_rate, summed_decay = 1e-4, 1e-3  # of the official code, whose gradient is 32 times ours
    assert sgd.lr == pytest.approx(summed_rate * 32) and sgd.lr * sgd.weight_decay == pytest.approx(summed_rate * summed_decay)
    half = data.complete(pare.Args(epochs=30, lr=1.0, as_released=True), "pare", "full")
    assert (half.epochs, half.warmup_epochs, half.decay_epochs, half.lr) == (30, 2.5, 30, 1.0) and round(
        half.k_end * 3136
    ) == 500
