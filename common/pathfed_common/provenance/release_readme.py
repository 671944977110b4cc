"""The model card for people: Markdown made of a card and nothing else. Pure."""

import math

from pathfed_common.provenance.release_card import Card, CardSite

_LIMITS = (
    "**Not for diagnosis.** Nothing here was tested as a medical device, and no claim is made about any clinical use.",
    "**Privacy is that of patients, at the epsilon stated, and of nothing else.** Hospitals, scanners and stains may show in the encoder. "
    "Somebody who knows a patient's slides learns at most what (epsilon, delta) allows about whether they were used.",
    "**Who is at several hospitals is counted by nobody.** The table by number of hospitals says what such a patient has spent at most.",
    "**Code is stated, not attested.** The digests of code are what each hospital's software says of itself.",
    "**What the figures of the evaluation mean** only the operator can say: nothing in this bundle checks them.",
)

#: What each aggregation rule does, for people.
_RULES = {
    "mean": "mean, by public weights",
    "trimmed_mean": "of each number, mean by public weights without the {trim} largest and the {trim} smallest values",
    "norm_weighted": "mean, by public weights, a longer update than the round's median counted as that long",
}


def readme(card: Card) -> bytes:
    """`encoder/README.md`. Equal cards give equal bytes."""
    parts = [_head(card), _data(card), _privacy(card), _sites(card), _training(card), _evaluation(card), _limits(card), _check()]
    return ("\n\n".join(part for part in parts if part) + "\n").encode()


def _head(card: Card) -> str:
    count = f"{len(card.sites)} hospital{'s' * (len(card.sites) != 1)}"
    start = f"the checkpoint `{card.init_from}`" if card.init_from else "random weights"
    return "\n".join(
        [
            f"# {card.plan_name}: pathology encoder of run {card.run}",
            "",
            f"A vision transformer ({card.preset}), pretrained by {count} together without a slide leaving any of them, from {start}.",
            "Every update was made differentially private for each patient before it left its hospital, signed there, and logged.",
            "",
            f"- encoder: `{card.encoder}` (`model.safetensors`, `config.json`; parameter names are timm's)",
            f"- plan: `{card.plan}`",
        ]
    )


def _data(card: Card) -> str:
    patients = sum(site.declared_patients for site in card.sites)
    named = [site.name for site in card.sites if site.named]
    unnamed = len(card.sites) - len(named)
    who = [*named, *([f"{unnamed} that did not agree to be named"] if unnamed else [])]
    lines = ["## Data", "", *(f"- {told}" for told in card.data)]
    lines.append(
        f"- At least {patients:,} patients, counted once for each hospital that has them: the lower bounds that hospitals declared."
    )
    lines.append(f"- Hospitals: {'; '.join(who)}.")
    return "\n".join(lines)


def _privacy(card: Card) -> str:
    lines = [
        "## Privacy",
        "",
        "The unit is the patient, with all slides: adding or removing one patient of a hospital changes the probability of anything that",
        f"left it by at most a factor exp(epsilon), but for delta = {card.delta:g}. Epsilons are computed by PLD accounting from the",
        "signed statements, and rounded up.",
        "",
        "| known to | epsilon at most |",
        "| --- | --- |",
        *(f"| {row.sites} hospital{'s' * (row.sites != 1)} | {_up(row.epsilon)} |" for row in card.overlaps),
        "",
        f"Each hospital approved at most {card.epsilon_limit:g} for this plan. "
        f"Each step drew {card.expected_patients:g} patients of a hospital on average; noise multiplier {card.noise_multiplier:g}, "
        f"clip norm {card.clip_norm:g}.",
    ]
    if card.unslotted:
        lines += [
            "",
            f"**{card.unslotted} replies did not wait for the plan's public time slots**, by the hospital's own policy: how long they "
            "took is not covered by epsilon.",
        ]
    return "\n".join(lines)


def _sites(card: Card) -> str:
    head = [
        "## Hospitals",
        "",
        "| hospital | declared patients | rounds | epsilon | epsilon it states |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *(_row(site) for site in card.sites)])


def _row(site: CardSite) -> str:
    return f"| {site.name} | {site.declared_patients:,} | {site.rounds} | {_up(site.epsilon)} | {_up(site.epsilon_stated)} |"


def _training(card: Card) -> str:
    codes = sorted({code for site in card.sites for code in site.codes})
    lines = [
        "## Training",
        "",
        f"- trained of the encoder: {card.part}",
        f"- objective: {card.objective}",
        f"- {card.rounds} rounds of {card.steps} private step(s) at each hospital",
        f"- updates of a round: {_RULES[card.rule].format(trim=card.trim)}",
        f"- updates travelled as {card.wire}: {_rounding(card)}",
    ]
    if card.average:
        lines.append(
            f"- released: not the last round's encoder but a running average, which kept {card.average:g} of itself in each round and "
            "began as the first encoder"
        )
    return "\n".join([*lines, *(f"- code, as hospitals state it: `{code}`" for code in codes)])


def _rounding(card: Card) -> str:
    if card.wire == "float32":
        return "nothing was rounded for it"
    return f"after the noise, which rounding moved by at most {math.ceil(card.rounding_share * 1e5) / 1e3:.3f}% of itself in any update"


def _evaluation(card: Card) -> str:
    if not card.evaluation:
        return "## Evaluation\n\nNone was given."
    head = ["## Evaluation", "", "As the operator gave it; nothing in this bundle checks it.", "", "| figure | value |", "| --- | --- |"]
    return "\n".join([*head, *(f"| {figure.name} | {figure.value} |" for figure in card.evaluation)])


def _limits(card: Card) -> str:
    return "\n".join(["## Limits", "", *(f"- {limit}" for limit in (*_LIMITS, _poisoning(card)))])


def _poisoning(card: Card) -> str:
    if card.rule == "trimmed_mean":
        return (
            f"**{card.trim} dishonest hospital(s) in a round could have moved each number of its update**, within the range of the others' "
            "values; more than that, within the norm bounds."
        )
    held = " and the round's median norm" if card.rule == "norm_weighted" else ". There is no robust aggregation"
    return f"**A dishonest hospital could have poisoned the encoder** within the norm bounds{held}."


def _check() -> str:
    return "\n".join(
        [
            "## Check it yourself",
            "",
            "`pathfed verify` on the bundle that this folder came in recomputes what stands here, without a network and without trust in",
            "whoever hands it out. This folder alone is checked by the OpenSSF's tool:",
            "",
            "    model_signing verify key encoder --signature model.sig --public_key model-key.pem",
        ]
    )


def _up(epsilon: float | None) -> str:
    """Rounded up to three decimals."""
    return "beyond floating point" if epsilon is None else f"{math.ceil(epsilon * 1000) / 1000:.3f}"
