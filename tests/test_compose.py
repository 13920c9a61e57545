"""Mixtures: what their names mean, who is drawn, and that a part sees and draws only its own."""

import subprocess
import sys
import textwrap
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from scl_defense.compose import check_name, make_generator, parts_of
from scl_defense.errors import ComponentError, UserError
from scl_defense.generation import generate
from scl_defense.mixture import Mixture, Part
from scl_defense.plugins import default_host
from scl_defense.runtime import stream
from scl_defense.testing import _worlds as worlds
from scl_defense.testing._common import COMPONENT_CHECKS
from scl_defense.testing._generator_trials import Trials
from scl_defense.testing.generators import GENERATOR_CHECKS
from scl_defense.types import Context, component

THREAT = worlds.LINF


def made(name, **options):
    return make_generator(default_host(), name, options)


def views_of(generator, batch=None, *, seed=0, step=0, network=None):
    batch = worlds.batch_of(64) if batch is None else batch
    context = Context(
        threat=THREAT,
        rng=stream(seed, "generator", 0, step),
        calibration=worlds.pictures(12, worlds.GREY, seed=77)[0],
        step=step,
        streams=lambda purpose, *counters: stream(seed, f"generator {purpose}", *counters),
    )
    return generate(generator, batch, context, network=network)


@component
class Shift:
    """Every pixel moved by the same amount: tells which part made an image."""

    needs: ClassVar[frozenset[str]] = frozenset()

    by: float = 0.01

    def __call__(self, batch, context):
        return context.threat.project(batch.views[0], batch.views[0] + self.by)[None]


@component
class Greedy:
    """Uses the labels without having declared them."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch, context):
        return batch.views[:1] + 0 * context.labels.sum()


@component
class Labelled:
    """Declares the labels."""

    needs: ClassVar[frozenset[str]] = frozenset({"labels"})

    def __call__(self, batch, context):
        assert len(context.labels) == batch.views.shape[1]
        return batch.views[:1]


def shifts(*shares, by="image"):
    parts = [Part(f"shift{place}", share, Shift(by=0.02 * (place + 1))) for place, share in enumerate(shares)]
    return Mixture(tuple(parts), by)


def middle_batch(count=64):
    batch = worlds.batch_of(count)
    return type(batch)(torch.full_like(batch.views, 0.5), batch.labels, batch.images, batch.indices)


def which(adversarial):
    """(N,): the place of the part that made each image of a mixture of :func:`shifts`."""
    moved = (adversarial[0] - 0.5) / 0.02
    assert torch.allclose(moved, moved.round(), atol=1e-3) and (moved.flatten(1).std(1) < 1e-3).all()
    return moved.flatten(1).mean(1).round().long() - 1


# -- names


def test_shares_and_options_reach_their_parts():
    mixture = made(
        "mix:contrastive-pgd=0.25, corner-noise=3",
        **{"contrastive_pgd.steps": "4", "contrastive-pgd.space": "pixel", "corner-noise.views": 2, "by": "stack"},
    )
    first, second = mixture.parts
    assert (first.name, first.share, second.name, second.share) == ("contrastive-pgd", 0.25, "corner-noise", 3.0)
    assert (first.generator.steps, first.generator.space, second.generator.views) == (4, "pixel", 2)
    assert mixture.by == "stack" and mixture.needs == frozenset()
    again = made(
        "mix:contrastive-pgd=0.25, corner-noise=3",
        **{"contrastive-pgd": {"steps": 4, "space": "pixel"}, "corner-noise": {"views": 2}, "by": "stack"},
    )
    assert again == mixture and repr(again) == repr(mixture) and "space='pixel'" in repr(mixture)


def test_a_part_can_be_meant_by_its_place():
    mixture = made(
        "mix:contrastive-pgd,contrastive-pgd=2", **{"contrastive-pgd.steps": 4, "2.steps": 7, "1.space": "pixel"}
    )
    assert [part.generator.steps for part in mixture.parts] == [4, 7]
    assert [part.generator.space for part in mixture.parts] == ["pixel", "random-conv"]
    assert parts_of("mix:a,b=2") == [("a", 1.0), ("b", 2.0)]


def test_any_other_name_is_the_registrys():
    assert made("contrastive-pgd", steps=3) == default_host()["generator"].get("contrastive-pgd")(steps=3)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("mix:contrastive-pdg=1", {}, "did you mean 'contrastive-pgd'"),
        ("mix:", {}, "empty part"),
        ("mix:pgd,,none", {}, "empty part"),
        ("mix:pgd=0", {}, "must be a number above 0"),
        ("mix:pgd=-1,none=2", {}, "must be a number above 0"),
        ("mix:pgd=inf", {}, "must be a number above 0"),
        ("mix:pgd=half", {}, "share 'half' of 'pgd'"),
        ("mix:mix:pgd", {}, "list all parts in one mixture"),
        ("mix:pgd,none", {"by": "imgae"}, "'image', 'batch' or 'stack'"),
        ("mix:pgd,none", {"steps": 3}, "like pgd.steps=VALUE"),
        ("mix:pgd,none", {"pdg.steps": 3}, "did you mean 'pgd'"),
        ("mix:pgd,none", {"3.steps": 3}, "no part '3'"),
        ("mix:pgd,none", {"pgd.stesp": 3}, "did you mean 'steps'"),
        ("mix:pgd,none", {"none.steps": 3}, "no option 'steps'"),
        ("mix:pgd,none", {"pgd.steps": 0}, "greater than or equal to 1"),
        ("mix:contrastive-pgd-online,contrastive-pgd-online", {"2.ema": 0.9}, "share one encoder"),
        ("contrastive-pdg", {}, "did you mean 'contrastive-pgd'"),
    ],
)
def test_a_wrong_name_is_one_line(name, options, says):
    with pytest.raises(UserError) as caught:
        made(name, **options)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_names_are_checked_without_building_anything():
    check_name(default_host(), "mix:contrastive-pgd=0.5,corner-noise")
    check_name(default_host(), "file:anything at all")
    with pytest.raises(UserError, match="did you mean 'corner-noise'"):
        check_name(default_host(), "mix:contrastive-pgd=0.5,corner-nose")


def test_checking_a_name_imports_nothing_heavy():
    code = """
        import sys
        from scl_defense.compose import check_name
        from scl_defense.plugins import default_host
        try:
            check_name(default_host(), "mix:contrastive-pgd=0.5,corner-nose")
        except Exception as error:
            print(error, sorted({"torch", "numpy"} & set(sys.modules)))
    """
    told = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "did you mean 'corner-noise'" in told.stdout and told.stdout.strip().endswith("[]")


# -- who is drawn


def test_every_image_takes_one_part_with_the_shares_given():
    batch, mixture = middle_batch(500), shifts(1, 3)
    first, again, other = (which(views_of(mixture, batch, step=step)) for step in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    drawn = torch.cat([which(views_of(mixture, batch, step=step)) for step in range(8)])
    assert set(drawn.tolist()) == {0, 1}
    # 4000 draws with p = 3/4: a standard deviation of 0.0068.
    assert abs(float((drawn == 1).float().mean()) - 0.75) < 4 * 0.0068


def test_a_batch_takes_one_part():
    batch, mixture = middle_batch(16), shifts(1, 2, by="batch")
    drawn = [which(views_of(mixture, batch, step=step)) for step in range(200)]
    assert all((parts == parts[0]).all() for parts in drawn)
    share = sum(int(parts[0]) for parts in drawn) / len(drawn)
    assert abs(share - 2 / 3) < 4 * (2 / 9 / 200) ** 0.5


def test_stacked_parts_each_make_their_own_views():
    mixture = made("mix:corner-noise,none,uniform-noise", **{"by": "stack", "uniform-noise.views": 2})
    found = views_of(mixture)
    assert found.shape[0] == 3
    batch = worlds.batch_of(64)
    # The second part goes on around the second view, where the first one stopped.
    turned = replace(batch, views=batch.views.roll(-1, 0))
    alone = views_of(made("mix:uniform-noise", **{"uniform-noise.views": 2}), turned)
    assert torch.equal(found[1:], alone)
    assert THREAT.contains(batch.views[1], alone[0]).all() and not THREAT.contains(batch.views[0], alone[0]).any()


def test_stacked_views_go_round_the_views():
    batch = worlds.batch_of(8, views=3)
    found = views_of(made("mix:uniform-noise,corner-noise,uniform-noise,corner-noise", by="stack"), batch)
    for place in range(4):
        assert THREAT.contains(batch.views[place % 3], found[place]).all()


def test_a_single_part_is_that_part_alone():
    mixture = made("mix:corner-noise")
    batch = worlds.batch_of(64)
    moved = (views_of(mixture, batch)[0] - batch.views[0]).abs()
    inside = (batch.views[0] > 0.1) & (batch.views[0] < 0.9)
    assert inside.any() and torch.allclose(moved[inside], torch.tensor(0.1), atol=1e-6)


def test_another_part_beside_it_does_not_change_what_a_part_makes():
    """Images that a part keeps when another joins are the same, bit for bit."""
    alone = views_of(made("mix:uniform-noise"))
    mixed = views_of(made("mix:corner-noise=1,uniform-noise=1"))
    kept = (alone == mixed).flatten(2).all(2)[0]
    assert 16 < int(kept.sum()) < 48
    corner = views_of(made("mix:corner-noise"))
    assert torch.equal(mixed[:, ~kept], corner[:, ~kept])


def test_two_parts_of_one_name_do_not_repeat_each_other():
    batch = worlds.batch_of(64)
    batch = replace(batch, views=batch.views[:1])
    found = views_of(made("mix:uniform-noise,uniform-noise", by="stack"), batch)
    assert len(found) == 2 and not torch.equal(found[0], found[1])


def test_parts_that_make_different_numbers_of_views_cannot_share_images():
    mixture = made("mix:corner-noise,uniform-noise", **{"corner-noise.views": 2})
    with pytest.raises(UserError, match=r"equally many .*corner-noise 2.*by=batch or stack"):
        views_of(mixture)
    assert len(views_of(made("mix:corner-noise,uniform-noise", **{"corner-noise.views": 2, "by": "stack"}))) == 3


# -- what a part sees


def test_needs_are_the_union_and_each_part_sees_its_own():
    assert made("mix:pgd,contrastive-pgd-online,none").needs == {"logits", "labels", "embed"}
    mixture = Mixture((Part("labelled", 1, Labelled()), Part("greedy", 1, Greedy())), "stack")
    assert mixture.needs == {"labels"}
    with pytest.raises(ComponentError, match=r"part 'greedy' of .* used context.labels"):
        views_of(mixture)
    views_of(Mixture((Part("labelled", 1, Labelled()),), "stack"))


def test_a_parts_fault_names_the_part():
    def wrong(batch, context):
        return batch.views[0]

    wrong.needs = frozenset()
    mixture = Mixture((Part("shift", 1, Shift()), Part("wrong", 1, wrong)), "stack")
    with pytest.raises(ComponentError, match=r"part 'wrong' of this generator must return"):
        views_of(mixture)


def test_the_twin_of_the_part_that_follows_the_encoder_counts():
    assert made("mix:contrastive-pgd-online,corner-noise", **{"contrastive-pgd-online.ema": 0.9}).ema == 0.9
    assert made("mix:pgd,corner-noise").ema == 0.0


def test_parts_may_refuse_the_data_before_training():
    asked = []

    class Careful:
        needs = frozenset()

        def prepare(self, data, threat):
            asked.append((data, threat))

    Mixture((Part("careful", 1, Careful()), Part("shift", 1, Shift()))).prepare("data", THREAT)
    assert asked == [("data", THREAT)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mix:contrastive-pgd=0.5,corner-noise=0.5", {"contrastive-pgd.space": "pixel", "contrastive-pgd.steps": 2}),
        ("mix:contrastive-pgd-online,pgd", {"by": "batch", "contrastive-pgd-online.ema": 0.5, "pgd.steps": 3}),
        ("mix:uniform-noise,pgd", {"by": "stack", "pgd.steps": 2}),
    ],
)
def test_a_mixture_keeps_the_contract_of_generators(name, options):
    """All checks but those on the class: a mixture is built from a name, not from options of its own class."""
    trials = Trials(made(name, **options), name)
    beats = {"check_beats_corner_noise", "check_linear_optimum"}  # half of it is noise, rightly
    for check in GENERATOR_CHECKS:
        if check not in COMPONENT_CHECKS and check.__name__ not in beats:
            try:
                check(trials)
            except Exception as error:
                assert type(error).__name__ == "NotApplicable", f"{check.__name__}: {error}"
