"""Other wordings of a relation -> paraphrases of all its facts.

A file of templates is YAML (or JSON): relation -> list of prompts that hold ``{subject}`` and end
before the object, as ``capital: ["The seat of the government of {subject} is"]``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.retention.probes import Probe

SUBJECT = "{subject}"


def read_templates(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Templates of a file, by relation. Raises MlxSvdError naming file and relation."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MlxSvdError(
            f"{path}: cannot be read as YAML; give relations with lists of prompts in quotes"
        ) from error
    return check_templates(content, str(path))


def check_templates(content: Any, where: str) -> dict[str, tuple[str, ...]]:
    """Templates by relation, if ``content`` is that; else MlxSvdError beginning with ``where``."""
    if not isinstance(content, Mapping) or not content:
        raise MlxSvdError(f"{where}: is no mapping of relations to lists of prompts")
    for relation, prompts in content.items():
        good = isinstance(prompts, list) and prompts
        if not good or not all(isinstance(p, str) and p.count(SUBJECT) == 1 for p in prompts):
            raise MlxSvdError(
                f"{where}: relation {relation!r}: give a list of texts with {SUBJECT} in each, once"
            )
    return {str(relation): tuple(prompts) for relation, prompts in content.items()}


def with_paraphrases(
    probes: Sequence[Probe], templates: Mapping[str, Sequence[str]]
) -> list[Probe]:
    """The probes with one more paraphrase for each template of their relation.

    A prompt begins with a capital letter also where its subject does not; one that is the fact's
    own prompt, or that it has already, is not added. Raises MlxSvdError for a relation that no
    probe has.
    """
    relations = sorted({probe.fact.relation for probe in probes})
    for relation in templates:
        if relation not in relations:
            near = get_close_matches(relation, relations) or relations[:5]
            raise MlxSvdError(
                f"paraphrases: no fact has the relation {relation!r}; correct or remove it "
                f"(the facts have {', '.join(near)})"
            )
    return [_added(probe, templates.get(probe.fact.relation, ())) for probe in probes]


def _added(probe: Probe, templates: Sequence[str]) -> Probe:
    prompts = list(probe.paraphrases)
    for template in templates:
        prompt = template.replace(SUBJECT, probe.fact.subject)
        prompt = prompt[0].upper() + prompt[1:]
        if prompt != probe.fact.prompt and prompt not in prompts:
            prompts.append(prompt)
    return replace(probe, paraphrases=tuple(prompts))
