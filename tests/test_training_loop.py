"""The loop that the examples train with: what it minimises, when it stops, what it averages and reports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (the extra train)")

from examples.common import loop  # noqa: E402

WANTED = 3.0


def batches() -> Iterator[Any]:
    while True:
        yield torch.randn(16, 1)


def fit(schedule: loop.Schedule, log: Path | None = None) -> tuple[Any, loop.Trained, list[float]]:
    """A line through the origin learns the slope WANTED; the slopes at the evaluations come last."""
    loop.seed(5)
    model = torch.nn.Linear(1, 1, bias=False)
    seen: list[float] = []

    def loss(batch: Any) -> Any:
        assert model.training
        return ((model(batch) - WANTED * batch) ** 2).mean()

    def evaluate() -> dict[str, float]:
        assert not model.training
        seen.append(model.weight.item())
        return {"loss": (model.weight.item() - WANTED) ** 2}

    return model, loop.train(model, batches(), loss, evaluate, schedule, log), seen


def schedule(**changes: Any) -> loop.Schedule:
    return loop.Schedule(**{"seconds": 60.0, "steps": 200, "rate": 0.1, "warmup": 10, "averaged": 2, **changes})


def test_loop_learns_the_slope() -> None:
    model, trained, _ = fit(schedule())
    assert model.weight.item() == pytest.approx(WANTED, abs=0.01)
    assert trained.steps == 200


def test_result_is_the_mean_of_the_last_evaluations() -> None:
    model, trained, seen = fit(schedule(steps=40, evaluate_every=0.25))
    *evaluated, averaged = seen
    assert averaged == pytest.approx((evaluated[-1] + evaluated[-2]) / 2)
    best = averaged if abs(averaged - WANTED) <= abs(evaluated[-1] - WANTED) else evaluated[-1]
    assert model.weight.item() == pytest.approx(best)
    assert trained.state["weight"].item() == pytest.approx(best)


def test_average_that_is_worse_gives_way_to_the_last_state() -> None:
    model, _, seen = fit(schedule(steps=20, evaluate_every=0.5, rate=0.01, decay="inverse_sqrt"))
    assert abs(seen[-1] - WANTED) > abs(seen[-2] - WANTED)  # still far away: the mean lags
    assert model.weight.item() == pytest.approx(seen[-2])


def test_loop_stops_by_time() -> None:
    _, trained, _ = fit(schedule(seconds=0.5, steps=None))
    assert 0.5 <= trained.seconds < 5
    assert trained.steps > 10


def test_one_seed_gives_one_result() -> None:
    (one, *_), (other, *_) = fit(schedule()), fit(schedule())
    assert torch.equal(one.weight, other.weight)


def test_log_holds_a_line_of_json_for_each_report(tmp_path: Path) -> None:
    log = tmp_path / "new" / "training.log"
    _, trained, seen = fit(schedule(evaluate_every=0.5), log)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines == trained.curves
    assert [line["step"] for line in lines if "validation" in line] == [100, 200]
    assert lines[-1]["kept"] == trained.scores
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("decay", "step", "progress", "wanted"),
    [
        ("cosine", 5, 0.01, 0.5),
        ("cosine", 2, 0.08, 0.8),  # a tenth of the budget ends the climb
        ("cosine", 10, 0.0, 1.0),
        ("cosine", 500, 0.5, 0.51),
        ("cosine", 999, 1.0, 0.02),
        ("inverse_sqrt", 1, 0.0, 0.1),
        ("inverse_sqrt", 40, 0.9, 0.5),
        ("inverse_sqrt", 5, 0.5, 1.0),
    ],
)
def test_rate_climbs_and_decays(decay: str, step: int, progress: float, wanted: float) -> None:
    assert schedule(rate=1.0, decay=decay).rate_at(step, progress) == pytest.approx(wanted)


def test_average_leaves_integers_alone() -> None:
    states = [{"w": torch.tensor([w, 5.0]), "n": torch.tensor(n)} for w, n in ((1.0, 1), (3.0, 2))]
    mean = loop.average(states)
    assert mean["w"].tolist() == [2.0, 5.0]
    assert mean["n"].item() == 2


def test_schedule_names_every_fault() -> None:
    with pytest.raises(ValueError, match=r"decay is 'line'.*evaluate_every is 2.*warmup is 0"):
        schedule(decay="line", evaluate_every=2, warmup=0)
