"""The text format of metrics, as Prometheus's own parser reads it."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from easyllm.serve.exposition import Counter, Gauge, Histogram


def parsed(metric):
    text = "".join(f"{line}\n" for line in metric.lines())
    (family,) = text_string_to_metric_families(text)
    return family


def samples_of(metric):
    return {(s.name, *sorted(s.labels.items())): s.value for s in parsed(metric).samples}


def test_a_counter_adds_up_by_labels():
    counter = Counter("requests_total", "Requests.", ("route", "status"))
    counter.add(("/v1", "200"))
    counter.add(("/v1", "200"), 2)
    counter.add(("/v1", "404"), 0.5)
    family = parsed(counter)
    assert (family.type, family.documentation) == ("counter", "Requests.")
    labels = [("route", "/v1"), ("status", "200")]
    assert samples_of(counter)["requests_total", *labels] == 3
    assert samples_of(counter)["requests_total", ("route", "/v1"), ("status", "404")] == 0.5


def test_a_counter_of_zero_is_visible():
    counter = Counter("tokens_total", "Tokens.", ("model",))
    counter.add(("m",), 0)
    assert samples_of(counter) == {("tokens_total", ("model", "m")): 0}


def test_a_gauge_is_read_when_it_is_rendered():
    values = {"a": 1.0}
    gauge = Gauge("running", "Running.", ("model",), lambda: [((k,), v) for k, v in values.items()])
    assert samples_of(gauge) == {("running", ("model", "a")): 1}
    values["a"] = 0.25
    assert samples_of(gauge) == {("running", ("model", "a")): 0.25}


def test_a_histogram_counts_each_value_in_its_bucket_and_all_wider_ones():
    histogram = Histogram("wait_seconds", "Wait.", ("model",), (0.1, 1, 10))
    histogram.observe(("m",), 0.1)  # bounds are inclusive
    histogram.observe(("m",), 0.5, count=3)
    histogram.observe(("m",), 99)
    found = samples_of(histogram)
    assert parsed(histogram).type == "histogram"
    buckets = {
        bound: found["wait_seconds_bucket", ("le", bound), ("model", "m")]
        for bound in ("0.1", "1", "10", "+Inf")
    }
    assert buckets == {"0.1": 1, "1": 4, "10": 4, "+Inf": 5}
    assert found["wait_seconds_count", ("model", "m")] == 5
    assert found["wait_seconds_sum", ("model", "m")] == pytest.approx(0.1 + 1.5 + 99)


def test_a_histogram_without_values_has_only_its_head():
    assert len(list(Histogram("x_seconds", "X.", ("model",), (1,)).lines())) == 2


@pytest.mark.parametrize("text", ['a"b', "a\\b", "a\nb", "a\\nb", "模型", "a}b{,= ", ""])
def test_any_text_is_a_label(text):
    counter = Counter("requests_total", "Requests.", ("route",))
    counter.add((text,))
    assert samples_of(counter) == {("requests_total", ("route", text)): 1}


def test_a_lone_surrogate_does_not_break_the_encoding():
    counter = Counter("requests_total", "Requests.", ("route",))
    counter.add(("a\ud800b",))
    assert "\n".join(counter.lines()).encode("utf-8").endswith(b"1")


def test_a_help_text_of_several_lines_stays_in_one():
    counter = Counter("requests_total", "One\\two\nthree.", ())
    counter.add(())
    assert parsed(counter).documentation == "One\\two\nthree."
