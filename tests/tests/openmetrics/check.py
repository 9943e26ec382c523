"""Reads a text in the OpenMetrics format from standard input, by Prometheus' own parser, and prints what it found, a sample a line.

What that parser lets pass is checked besides: that names begin as all of ours do, end in their unit, and are in base units, and that there is help.
"""

import sys

from prometheus_client.openmetrics.parser import text_string_to_metric_families

seen = set()
for family in text_string_to_metric_families(sys.stdin.read()):
    assert family.name.startswith("sepal_"), family
    assert family.name not in seen, f"{family.name} twice"
    seen.add(family.name)
    assert family.documentation.endswith("."), family
    assert family.type in ("counter", "gauge", "info", "stateset"), family
    assert not family.unit or family.name.endswith("_" + family.unit), family
    assert family.unit in ("", "seconds", "bytes"), family
    for word in ("seconds", "bytes"):
        assert family.unit == word or word not in family.name.split("_"), f"{family.name} without its unit"
    assert family.samples, f"{family.name} is empty"
    print(f"family {family.name} {family.type}")
    for sample in family.samples:
        labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
        print(f"{sample.name}{{{labels}}} {sample.value}")
