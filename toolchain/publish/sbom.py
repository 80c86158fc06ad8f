"""A bill of materials of a run in CycloneDX's form: the model, its files by digest, and the packages that wrote them."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.errors import ArtifactError, RecipeError
from toolchain.files import digest_of
from toolchain.publish.manifest import Manifest
from toolchain.report.record import Report

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

SPACE = uuid.UUID("6f0c3d1e-6a55-5b0e-9c1b-2f1d6f3f7a10")
"""What serial numbers are derived in, so that one run has one number."""
MAKER = "slimvit"


def sbom(folder: Path) -> str:
    """The bill of materials as JSON of CycloneDX 1.6, valid by its schema; the same for the same run.

    Args:
        folder: of the run.

    Raises:
        StorageError: it is not the folder of a run.
        ArtifactError: a file is missing or altered, or the outcome is not valid.
        RecipeError: the package that writes it is not installed.
    """
    manifest, report = Manifest.load(folder), Report.load(folder)
    manifest.require(folder)
    try:
        from cyclonedx.model.bom import Bom, BomMetaData
        from cyclonedx.model.tool import ToolRepository
        from cyclonedx.output.json import JsonV1Dot6
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
    except ImportError:
        raise RecipeError("manifest sbom needs another package. Try: pip install 'slimvit[sbom]'") from None
    model, files, packages = _model(report), _files(manifest), _packages(manifest)
    maker = [package for package in packages if package.name == MAKER]
    bom = Bom(
        components=[*files, *packages],
        serial_number=uuid.uuid5(SPACE, digest_of(manifest.model_dump(mode="json"))),
        metadata=BomMetaData(component=model, tools=ToolRepository(components=maker)),
    )
    bom.register_dependency(model, files)
    for file in files:
        bom.register_dependency(file, packages)
    content = json.loads(JsonV1Dot6(bom).output_as_string())
    del content["metadata"]["timestamp"]  # which is that of the writing, and would differ each time
    text = json.dumps(content, indent=2) + "\n"
    if (error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)) is not None:
        raise ArtifactError(f"the bill of materials of {folder} is not valid by CycloneDX's schema: {error}")
    return text


def _model(report: Report) -> Component:
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component, ComponentType

    facts = {
        "timm": report.model.name,
        "kwargs": json.dumps(report.model.kwargs, sort_keys=True),
        "checkpoint_sha256": report.model.checkpoint_sha256 or "",
        "output": report.output,
        "method": report.requested_method,
        "data": report.data.source,
        "data_digest": report.data.digest,
        "recipe_digest": report.recipe_digest,
        "params_dense": str(report.dense.params),
        "params": str(report.compressed.params),
    }
    return Component(
        name=report.model.name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        version=report.recipe_digest,
        bom_ref="model",
        description=f"timm's {report.model.name} with {100 * report.ratio.params:.1f} % of its parameters",
        properties=[Property(name=f"slimvit:{name}", value=value) for name, value in facts.items() if value],
    )


def _files(manifest: Manifest) -> list[Component]:
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.component import Component, ComponentType

    return [
        Component(
            name=file.path,
            type=ComponentType.FILE,
            bom_ref=f"file:{file.path}",
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=file.sha256)],
            properties=[] if file.bytes is None else [Property(name="slimvit:bytes", value=str(file.bytes))],
        )
        for file in manifest.files
    ]


def _packages(manifest: Manifest) -> list[Component]:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    return [
        Component(
            name=name,
            type=ComponentType.LIBRARY,
            version=version,
            bom_ref=f"package:{name}",
            purl=PackageURL("pypi", None, name, version),
        )
        for name, version in manifest.versions.items()
    ]
