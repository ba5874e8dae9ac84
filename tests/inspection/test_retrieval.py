"""The prompts of a folder by similarity, and the ones that could not be compared."""

from __future__ import annotations

import pytest

from oracles.stored import drawn, folder
from softprompt.errors import ArtifactError, ConfigError
from softprompt.inspection import similar_prompts
from softprompt.prompts import similarity

QUERY = drawn(0)


@pytest.fixture
def library(tmp_path):
    root = tmp_path / "library"
    root.mkdir()
    folder(root / "same", QUERY.clone())
    folder(root / "near", QUERY + 0.3 * drawn(1))
    folder(root / "opposite", -QUERY)
    folder(root / "longer", drawn(2, 5))
    (root / "notes.txt").write_text("not a folder")
    return root


def test_the_most_similar_come_first_with_the_weights_of_their_average(library):
    found = similar_prompts(folder(library.parent / "query", QUERY), library).found
    names = [each.prompt.rpartition("/")[2] for each in found]
    assert names[:2] == ["same", "near"]
    assert names[-1] == "opposite"
    cosines = [each.similarity for each in found]
    assert cosines == sorted(cosines, reverse=True)
    assert found[1].similarity == pytest.approx(similarity(QUERY, QUERY + 0.3 * drawn(1)))
    positive = [max(cosine, 0) for cosine in cosines]
    assert [each.weight for each in found] == pytest.approx([p / sum(positive) for p in positive])


def test_the_top_k_by_either_measure_without_the_prompt_itself(library):
    query = library / "near"
    found = similar_prompts(query, library, top=1, measure="pairs").found
    assert [each.prompt for each in found] == [str(library / "same")]
    assert found[0].weight == 1
    assert found[0].similarity == pytest.approx(similarity(QUERY + 0.3 * drawn(1), QUERY, "pairs"))


def test_what_is_not_compared_is_listed_with_the_reason(library):
    folder(library / "foreign", QUERY.clone(), base="two")
    (library / "empty").mkdir()
    damaged = folder(library / "damaged", QUERY.clone()) / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4])
    answer = similar_prompts(library / "same", library)
    reasons = {each.folder.rpartition("/")[2]: each.reason for each in answer.skipped}
    assert sorted(reasons) == ["damaged", "empty", "foreign"]
    assert "its base is two" in reasons["foreign"]
    assert "adapter_config.json" in reasons["empty"]
    assert "damaged" in reasons["damaged"]
    assert len(answer.found) == 3
    assert set(answer.to_dict()) == {"found", "skipped"}


def test_nothing_similar_weighs_nothing(library):
    query = folder(library.parent / "query", QUERY)
    root = library.parent / "others"
    folder(root / "opposite", -QUERY)
    assert similar_prompts(query, root).found[0].weight == 0


def test_what_cannot_be_asked(library):
    with pytest.raises(ConfigError, match="top expects at least 1"):
        similar_prompts(library / "same", library, top=0)
    with pytest.raises(ConfigError, match="measure is one of"):
        similar_prompts(library / "same", library, measure="median")
    with pytest.raises(ArtifactError, match="is not a folder"):
        similar_prompts(library / "same", library / "notes.txt")
    with pytest.raises(ArtifactError, match="holds no folders"):
        similar_prompts(library / "same", library / "same")


def test_prompts_for_another_part_of_the_model_are_skipped(tmp_path):
    def seq2seq(name, rows, types):
        options = {"task_type": "SEQ_2_SEQ_LM", "output_model_types": types}
        return folder(tmp_path / name, rows, options=options, seq2seq=True)

    query = seq2seq("query", QUERY, ["DECODER"])
    (tmp_path / "library").mkdir()
    seq2seq("library/before", QUERY, ["ENCODER"])
    seq2seq("library/same", QUERY, ["DECODER"])
    unknown = {"base_fingerprint": {}, "seq2seq": True}
    options = {"task_type": "SEQ_2_SEQ_LM", "output_model_types": ["DECODER"]}
    folder(tmp_path / "library" / "unknown", QUERY, options=options, **unknown)
    found = similar_prompts(query, tmp_path / "library")
    assert [each.prompt.rpartition("/")[2] for each in found.found] == ["same", "unknown"]
    (skipped,) = found.skipped
    assert "stand before the input, not before the answer" in skipped.reason
