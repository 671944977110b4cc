"""A verified release in two forms that other tools read: W3C PROV-JSON, and a CycloneDX bill of materials of the model. Pure.

Both say less than the bundle and prove nothing: they are made from its documents once these were verified. Sites are named as the model
card names them, never by their short names.

Sources: https://www.w3.org/submissions/prov-json/ and https://cyclonedx.org/docs/1.6/json/.
"""

import time
import uuid
from collections.abc import Mapping
from typing import Any

from pathfed_common.digest import Digest
from pathfed_common.ids import SiteName
from pathfed_common.provenance import record
from pathfed_common.provenance.consistency import Contents, statements_by_site
from pathfed_common.provenance.record import RoundRecord
from pathfed_common.provenance.release_card import Card, card_names

_PREFIX = "https://pathfed.dev/prov#"
_NAMESPACE = uuid.UUID("5f0a7c0e-4d3d-5d6e-9a3e-6d1b6f1c2a10")
_SPEC = "1.6"

Json = dict[str, Any]


def prov_json(contents: Contents, release: Digest) -> Json:
    """The lineage: plan, states, updates and encoder as entities, rounds as activities, sites and server as agents.

    Args:
        contents: the record's documents.
        release: digest of the release's manifest.
    """
    names = card_names(contents, list(statements_by_site(contents)))
    made: Json = {"prefix": {"pf": _PREFIX}, "entity": {}, "activity": {}, "agent": {}}
    for kind in ("wasGeneratedBy", "used", "wasAssociatedWith", "wasAttributedTo", "wasDerivedFrom"):
        made[kind] = {}
    manifest = contents.manifest
    made["entity"]["pf:plan"] = _entity("plan", manifest.plan)
    made["agent"]["pf:server"] = {"prov:type": _name("prov:SoftwareAgent"), "pf:key": manifest.server_key.to_text()}
    for number, (site, name) in enumerate(names.items(), start=1):
        made["agent"][f"pf:site-{number}"] = {"prov:type": _name("prov:Organization"), "prov:label": name}
        made["used"][f"_:approved-{number}"] = {"prov:activity": "pf:round-0001", "prov:entity": f"pf:approval-{number}"}
        made["entity"][f"pf:approval-{number}"] = _entity("approval", _digest(contents, record.approval_path(site)))
        made["wasAttributedTo"][f"_:approval-{number}"] = {"prov:entity": f"pf:approval-{number}", "prov:agent": f"pf:site-{number}"}
    for index in range(manifest.rounds + 1):
        made["entity"][f"pf:state-{index:04d}"] = _entity("state", _digest(contents, record.state_path(index)))
    numbers = {site: number for number, site in enumerate(names, start=1)}
    for found, _ in contents.rounds:
        _add_round(made, found, numbers)
    _add_release(made, contents, release)
    return made


def _add_round(made: Json, found: RoundRecord, numbers: Mapping[SiteName, int]) -> None:
    index = found.round_index
    activity, before, after = f"pf:round-{index:04d}", f"pf:state-{index - 1:04d}", f"pf:state-{index:04d}"
    made["activity"][activity] = {"prov:startTime": _time(found.offered_at), "prov:endTime": _time(found.committed_at)}
    made["used"][f"_:base-{index}"] = {"prov:activity": activity, "prov:entity": before}
    made["used"][f"_:plan-{index}"] = {"prov:activity": activity, "prov:entity": "pf:plan"}
    made["wasGeneratedBy"][f"_:state-{index}"] = {"prov:entity": after, "prov:activity": activity}
    made["wasDerivedFrom"][f"_:state-{index}"] = {"prov:generatedEntity": after, "prov:usedEntity": before}
    made["wasAssociatedWith"][f"_:round-{index}"] = {"prov:activity": activity, "prov:agent": "pf:server"}
    for site in found.admitted:
        number = numbers[site.site]
        update, key = f"pf:update-{index:04d}-{number}", f"{index}-{number}"
        made["entity"][update] = {**_entity("update", site.update), "pf:statement": site.statement}
        made["wasAttributedTo"][f"_:update-{key}"] = {"prov:entity": update, "prov:agent": f"pf:site-{number}"}
        made["used"][f"_:update-{key}"] = {"prov:activity": activity, "prov:entity": update}
        made["wasDerivedFrom"][f"_:update-{key}"] = {"prov:generatedEntity": update, "prov:usedEntity": before}


def _add_release(made: Json, contents: Contents, release: Digest) -> None:
    last = f"pf:state-{contents.manifest.rounds:04d}"
    made["entity"]["pf:encoder"] = {**_entity("encoder", _digest(contents, record.ENCODER)), "pf:release": release}
    made["wasDerivedFrom"]["_:encoder"] = {"prov:generatedEntity": "pf:encoder", "prov:usedEntity": last}
    if contents.plan.server_optimiser.ema:
        for index in range(contents.manifest.rounds):
            used = f"pf:state-{index:04d}"
            made["wasDerivedFrom"][f"_:encoder-{index}"] = {"prov:generatedEntity": "pf:encoder", "prov:usedEntity": used}
    made["wasAttributedTo"]["_:encoder"] = {"prov:entity": "pf:encoder", "prov:agent": "pf:server"}


def ml_bom(card: Card, release: Digest, *, at: float) -> Json:
    """A CycloneDX 1.6 bill of materials with one component, the encoder, and its model card.

    Args:
        card: the release's card.
        release: digest of the release's manifest.
        at: UTC seconds of the last round.
    """
    component: Json = {
        "type": "machine-learning-model",
        "bom-ref": "encoder",
        "name": card.plan_name,
        "version": card.run,
        "description": f"Pathology encoder ({card.preset}), pretrained by {len(card.sites)} hospitals, private for each patient.",
        "hashes": [{"alg": "SHA-256", "content": card.encoder.removeprefix("sha256:")}],
        "modelCard": _model_card(card),
        "properties": _properties(card, release),
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": _SPEC,
        "serialNumber": uuid.uuid5(_NAMESPACE, release).urn,
        "version": 1,
        "metadata": {"timestamp": _time(at), "component": component},
    }


def _model_card(card: Card) -> Json:
    found: Json = {
        "modelParameters": {
            "approach": {"type": "self-supervised"},
            "task": "feature extraction from histopathology tiles",
            "architectureFamily": "vision transformer",
            "modelArchitecture": card.preset,
            "datasets": [{"type": "dataset", "name": "tiles of the participating hospitals", "description": " ".join(card.data)}],
        },
        "considerations": {
            "technicalLimitations": [
                "Not for diagnosis.",
                "Hospitals, scanners and stains may show in the encoder.",
                "The code that hospitals ran is stated, not attested.",
            ],
            "ethicalConsiderations": [
                {"name": "privacy of patients", "mitigationStrategy": _overlap(row.sites, row.epsilon, card.delta)} for row in card.overlaps
            ],
        },
    }
    if card.evaluation:
        metrics = [{"type": figure.name, "value": figure.value} for figure in card.evaluation]
        found["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    return found


def _overlap(sites: int, epsilon: float | None, delta: float) -> str:
    bound = "beyond floating point" if epsilon is None else f"{epsilon:.4f}"
    return f"differential privacy for a patient of {sites} hospital(s): epsilon {bound} at delta {delta:g}"


def _properties(card: Card, release: Digest) -> list[Json]:
    values = {
        "release": release,
        "plan": card.plan,
        "init_from": card.init_from or "random weights",
        "rounds": str(card.rounds),
        "aggregation": card.rule,
        "running_average": f"{card.average:g}",
        "noise_multiplier": f"{card.noise_multiplier:g}",
        "clip_norm": f"{card.clip_norm:g}",
    }
    hospitals = [{"name": "pathfed:hospital", "value": site.name} for site in card.sites]
    return [*({"name": f"pathfed:{name}", "value": value} for name, value in values.items()), *hospitals]


def _entity(kind: str, digest: Digest) -> Json:
    return {"prov:type": _name(f"pf:{kind}"), "pf:digest": digest}


def _name(qualified: str) -> Json:
    return {"$": qualified, "type": "prov:QUALIFIED_NAME"}


def _digest(contents: Contents, path: str) -> Digest:
    entry = contents.manifest.entry(path)
    if entry is None:
        raise ValueError(f"a verified record lists {path}")
    return entry.digest


def _time(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
