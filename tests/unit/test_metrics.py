"""The series are named by Prometheus' rules, can be parsed, and are as many as the agent has states, not instances."""

import re
from collections.abc import Iterator

import pytest
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from autobackup.metrics import Metrics

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-")

# Prometheus' base units, and what is counted: https://prometheus.io/docs/practices/naming/
UNITS = ("_seconds", "_bytes", "_ratio", "_info")
WRONG_UNITS = re.compile(r"_(ms|milliseconds?|minutes?|hours?|days?|s|kb|mb|gb|kib|mib|gib|percent|count|sum|bucket)\b")

# What each label may say is a set that the code or the configuration closes; no set grows with the instances.
LABELS = {
    "destination": "names in the configuration",
    "kind": "image or base",
    "outcome": "names of errors, and a few words",
    "reason": "names of errors",
    "source": "who told of a disk",
    "stage": "stages of a job",
    "state": "states of a job",
    "verdict": "kinds of verdict",
    "version": "of the agent",
}


def made(metrics: Metrics) -> Iterator[tuple[str, MetricWrapperBase]]:
    for name, value in vars(metrics).items():
        if isinstance(value, MetricWrapperBase):
            yield name, value


def used() -> Metrics:
    """Every series with a value, as after a day of work."""
    metrics = Metrics()
    for _, metric in made(metrics):
        one = metric.labels(*(f"a{n}" for n in range(len(metric._labelnames)))) if metric._labelnames else metric
        if isinstance(one, Histogram):
            one.observe(7)
        elif isinstance(one, Counter | Gauge):
            one.inc(7)
    return metrics


METRICS = dict(made(Metrics()))


@pytest.fixture(scope="module")
def families() -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(used().render().decode())}


def test_there_is_something_to_check() -> None:
    assert len(METRICS) >= 10


@pytest.mark.parametrize("name", METRICS)
def test_a_name_follows_the_rules(name: str) -> None:
    (family,) = METRICS[name].describe()
    assert re.fullmatch(r"autobackup(_[a-z][a-z0-9]*)+", family.name)
    assert not family.name.endswith("_total"), "added by the library, to counters alone"
    assert not WRONG_UNITS.search(family.name)
    assert family.documentation
    assert not family.documentation.endswith(".")
    assert family.documentation[0].isupper() or family.documentation[0].isdigit()


@pytest.mark.parametrize("name", METRICS)
def test_a_unit_stands_at_the_end_of_a_name(name: str) -> None:
    (family,) = METRICS[name].describe()
    for unit in UNITS:
        assert unit not in family.name.removesuffix(unit)


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if isinstance(metric, Counter)])
def test_a_counter_is_written_with_total(name: str) -> None:
    (family,) = METRICS[name].describe()
    assert f"\n{family.name}_total" in used().render().decode()


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if not isinstance(metric, Counter)])
def test_what_is_no_counter_does_not_look_like_one(name: str) -> None:
    (family,) = METRICS[name].describe()
    assert f"\n{family.name}_total" not in used().render().decode()


@pytest.mark.parametrize("name", METRICS)
def test_no_label_grows_with_the_instances(name: str) -> None:
    """One series for every instance that ever was would end the server that scrapes them."""
    assert set(METRICS[name]._labelnames) <= set(LABELS)


def test_no_label_is_one_that_prometheus_adds() -> None:
    labels = {label for metric in METRICS.values() for label in metric._labelnames}
    assert not labels & {"job", "instance", "le", "quantile", "__name__"}


def test_the_text_can_be_parsed_and_holds_every_series(families: dict[str, Metric]) -> None:
    for metric in METRICS.values():
        (family,) = metric.describe()
        assert family.name in families


def test_a_value_comes_out_as_it_went_in() -> None:
    metrics = Metrics()
    metrics.jobs.labels(state="queued").set(3)
    metrics.read_bytes.inc(2**40)
    metrics.stage_duration.labels(stage="send").observe(61)
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }
    assert samples["autobackup_jobs", ("state", "queued")] == 3
    assert samples["autobackup_read_bytes_total",] == 2**40
    assert samples["autobackup_stage_duration_seconds_bucket", ("le", "60.0"), ("stage", "send")] == 0
    assert samples["autobackup_stage_duration_seconds_bucket", ("le", "300.0"), ("stage", "send")] == 1
    assert samples["autobackup_stage_duration_seconds_sum", ("stage", "send")] == 61


def test_the_version_is_told(families: dict[str, Metric]) -> None:
    (sample,) = families["autobackup_build_info"].samples
    assert sample.name == "autobackup_build_info"
    assert set(sample.labels) == {"version"}
    assert re.fullmatch(r"\d+\.\d+.*", sample.labels["version"])


def test_nothing_but_ours_is_told_and_no_id_of_an_instance() -> None:
    """The process has a registry of its own: what a library registers globally is not exposed by accident."""
    text = used().render().decode()
    assert all(line.startswith(("#", "autobackup_")) for line in text.splitlines())
    assert not UUID.search(text)


def test_two_agents_in_one_process_count_apart() -> None:
    one, two = Metrics(), Metrics()
    one.claims.set(5)
    assert b"autobackup_claims 5.0" in one.render()
    assert b"autobackup_claims 0.0" in two.render()
