"""A training under random faults ends exactly as an uninterrupted one."""

from pathlib import Path

import pytest

from tests.chaos.campaign import report, run_campaign, split
from tests.chaos.schedule import FORMS, draw_schedule


def test_a_schedule_depends_on_its_seed_only():
    for form in FORMS:
        assert draw_schedule(form, 40, 7, 5) == draw_schedule(form, 40, 7, 5)
        assert draw_schedule(form, 40, 7, 5) != draw_schedule(form, 40, 8, 5)


def test_most_faults_come_from_the_operating_system():
    for seed in range(10):
        faults = [fault for form in FORMS for fault in draw_schedule(form, 67, seed, 5)]
        assert sum(fault.system for fault in faults) >= 0.6 * len(faults)


@pytest.mark.parametrize("forms", [FORMS, ["plain"], ["ray-s3", "ray"]])
def test_faults_are_divided_among_the_forms(forms):
    for count in (20, 200, 201):
        counts = split(count, forms)
        assert list(counts) == list(forms)
        assert sum(counts.values()) == count
        assert all(counts.values())


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_training_under_faults_ends_as_an_uninterrupted_one(tmp_path: Path):
    campaign = run_campaign(tmp_path, {"plain": 4, "ray-s3": 3}, seed=1, log=lambda line: None)
    assert campaign.passed, report(campaign)
    assert len([each for each in campaign.injected if not each.no_target]) >= 4, report(campaign)
