from __future__ import annotations

import dataclasses
import json
import math
import platform
from datetime import datetime
from importlib import metadata

import pytest

from softprompt.artifacts import Manifest, manifest_of_task
from softprompt.artifacts.manifest import installed_versions
from softprompt.errors import ArtifactError


def test_json_round_trip_is_exact(manifest):
    assert Manifest.from_dict(json.loads(manifest.to_json())) == manifest


def test_no_labels_round_trip(manifest):
    free = dataclasses.replace(manifest, task="generation", labels=None)
    assert Manifest.from_dict(json.loads(free.to_json())) == free


def test_versions_and_time_of_creation_are_filled_in(manifest):
    values = {item.name: getattr(manifest, item.name) for item in dataclasses.fields(manifest)}
    del values["versions"], values["created"]
    fresh = Manifest(**values)
    assert {"python", "softprompt", "torch", "transformers"} <= set(fresh.versions)
    assert datetime.fromisoformat(fresh.created).utcoffset().total_seconds() == 0


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_json_cannot_hold_become_null(manifest, number):
    odd = dataclasses.replace(manifest, metrics={"perplexity": number, "deep": [{"x": number}]})
    assert json.loads(odd.to_json())["metrics"] == {"perplexity": None, "deep": [{"x": None}]}


def test_a_value_that_is_not_plain_is_refused_with_its_place(manifest):
    odd = dataclasses.replace(manifest, settings={"paths": [object()]})
    with pytest.raises(ArtifactError, match=r"settings\.paths\[0\] is a object"):
        odd.to_json()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format_version": 2}, "format_version 2.*reads up to 1.*upgrade"),
        ({"format_version": True}, "expected format_version 1"),
        ({"format_version": "1"}, "expected format_version 1"),
        ({"templat": "x"}, "unknown key 'templat'.*did you mean 'template'"),
        ({"task": "translation"}, "expected task .* got str 'translation'"),
        ({"labels": "yes,no"}, "expected labels"),
        ({"labels": [1, 2]}, "expected labels"),
        ({"max_source_length": "256"}, "expected max_source_length .* int, got str"),
        ({"max_source_length": True}, "expected max_source_length .* int, got bool"),
        ({"seq2seq": 1}, "expected seq2seq .* bool, got int"),
        ({"metrics": []}, "expected metrics"),
        ({"history": [1]}, "expected history"),
        ({"history": [{"loss": 1.0}]}, "expected history.epoch .* int, got NoneType"),
        ({"history": [{"epoch": 1, "loss": [1.0]}]}, "expected history.loss .* float, got list"),
        ({"history": [{"epoch": 1, "loss": 1.0, "validation": 3}]}, "expected history.validation .* dict, got int"),
        (
            {"history": [{"epoch": 1, "validation": {"accuracy": {}}}]},
            "history.validation.accuracy .* float, got dict",
        ),
        ({"metrics": {"validation": {"loss": "x"}}}, "expected metrics.validation.loss .* float, got str"),
        ({"settings": {"tuning_config": 3}}, "expected settings.tuning_config .* dict, got int"),
        ({"template": None}, "expected template"),
    ],
)
def test_values_of_a_wrong_kind_are_refused(manifest, change, expected):
    with pytest.raises(ArtifactError, match=expected) as caught:
        Manifest.from_dict({**manifest.to_dict(), **change})
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named(manifest):
    values = manifest.to_dict()
    del values["template"], values["labels"]
    with pytest.raises(ArtifactError, match="lacks template, labels"):
        Manifest.from_dict(values)


def test_a_missing_format_version_is_named(manifest):
    values = manifest.to_dict()
    del values["format_version"]
    with pytest.raises(ArtifactError, match="expected format_version 1"):
        Manifest.from_dict(values)


def test_the_tasks_of_a_multitask_prompt_are_kept(manifest):
    named = dataclasses.replace(manifest, tasks=("reviews", "posts"))
    assert Manifest.from_dict(json.loads(named.to_json())) == named


def test_a_file_from_before_there_were_tasks_is_read(manifest):
    values = manifest.to_dict()
    del values["tasks"]
    assert Manifest.from_dict(values).tasks is None


def test_a_task_that_the_data_does_not_describe_is_as_the_whole(manifest):
    own = {"template": "{{input}} ?", "task": "generation", "labels": None}
    several = dataclasses.replace(manifest, tasks=("a", "b"), data={"tasks": {"b": own}})
    assert manifest_of_task(several, 0) is several
    assert manifest_of_task(several, 1).template == "{{input}} ?"


def test_a_package_without_metadata_is_recorded_as_not_installed(monkeypatch):
    def version(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)
    assert set(installed_versions().values()) == {platform.python_version(), "not installed"}
