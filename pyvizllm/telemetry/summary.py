"""What tensorboardX's own summaries say of a publication: texts, images, layout, hparams."""

import re
from collections.abc import Mapping
from functools import lru_cache

from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import custom_scalars, hparams, text

from pyvizllm.telemetry.dashboard import Layout
from pyvizllm.telemetry.descriptions import STAGE_TAG
from pyvizllm.telemetry.records import Finding, Publication

_RGB = 3
_METRICS = ("train/loss", "eval/loss")  # shown beside the hyper-parameters, where they exist


@lru_cache(maxsize=1 << 16)  # as many as there are tags, at every publication
def clean_tag(tag: str) -> str:
    """`tag` with everything but letters, digits and `_ - . /` replaced by `_`."""
    return re.sub(r"[^-/\w.]", "_", tag).lstrip("/")


def log10_tag(tag: str) -> str:
    """`KIND/NAME` of the value axis as `KIND_log10/NAME`."""
    kind, slash, name = tag.partition("/")
    return f"{kind}_log10{slash}{name}"


def layout_value(layout: Layout) -> bytes:
    """The serialised Summary of a dashboard, which stands for the one before it."""
    charts = {
        category: {title: ["Multiline", list(tags)] for title, tags in charts.items()}
        for category, charts in layout.items()
    }
    data: bytes = custom_scalars(charts).SerializeToString()
    return data


def hparams_values(settings: Mapping[str, bool | float | str]) -> bytes:
    """The serialised Summary of a run's hyper-parameters."""
    # Without the end of the session, which tensorboardX would call a success at its start.
    values = {_readable(name): _parameter(value) for name, value in settings.items()}
    summary = Summary()
    for part in hparams(values, dict.fromkeys(_METRICS, 0.0))[:2]:
        summary.MergeFrom(part)
    data: bytes = summary.SerializeToString()
    return data


def _parameter(value: bool | float | str) -> bool | float | str:
    if isinstance(value, str):
        return _readable(value)
    return value if isinstance(value, bool) else float(value)


def _readable(text: str) -> str:
    """`text` without halves of characters, as names of files have them: protobuf takes none."""
    return text.encode(errors="replace").decode()


def passing_values(publication: Publication) -> bytes:
    """The serialised Summary of the step's texts, findings and images."""
    summary = Summary()
    texts = dict(publication.texts)
    for finding in publication.findings:
        tag = f"diagnosis/{finding.rule}"
        texts[tag] = "\n\n".join(filter(None, (texts.get(tag), finding_text(finding))))
    if STAGE_TAG in texts:
        texts[STAGE_TAG] = f"Gradients are measured: **{texts[STAGE_TAG]}**."
    for tag, content in texts.items():
        summary.MergeFrom(text(clean_tag(tag), _readable(content)))
    for tag, picture in publication.images.items():
        image = Summary.Image(
            height=picture.height,
            width=picture.width,
            colorspace=_RGB,
            encoded_image_string=picture.png,
        )
        summary.value.add(tag=clean_tag(tag), image=image)
    data: bytes = summary.SerializeToString()
    return data


def finding_text(finding: Finding) -> str:
    """A finding in Markdown."""
    evidence = [f"- {name}: {_short(v)}" for name, v in finding.evidence.items() if v != ""]
    title = f"**{finding.severity}**, step {finding.step}: {finding.sentence}"
    return "\n\n".join(filter(None, (title, finding.advice, "\n".join(evidence))))


def _short(value: float | str) -> str:
    """Six digits of a float; whole numbers, such as an index, as they are."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
