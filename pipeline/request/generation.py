"""What `depthvar generate`, `depthvar plan` and `depthvar submit` can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from depthvar.config import IMAGE_SIZE, KNOWN_MODELS
from depthvar.policy import DepthPolicy
from depthvar.presets import DEFAULT_PRESET, OPTIONS, PRESETS, TEXT_PRESET
from depthvar.settings import Kernels
from pipeline.request.classes import quoted
from pipeline.request.flags import JobConfig
from pipeline.request.marks import HelpGroup, Metavar
from pipeline.request.paths import JobFile, LocalPath, Location, ModelName, Weights
from pipeline.request.yaml_file import FieldsOf

Device = Literal["auto", "cpu", "cuda"]
ImageFormat = Literal["png", "jpg", "webp"]
Precision = Literal["float32", "bfloat16", "float16"]
DEFAULT_PNG_LEVEL = 6
DEFAULT_BATCH_SIZE = 50
DEFAULT_PRECISION: Precision = "float32"
Scalar = bool | int | float | str | None
_LABELS, _WORDS = ("classes", "labels_file"), ("class_names", "prompts")
"""What says what images show, of a class-conditional and of a text model."""
_IN_WORDS = ("class_names", "templates", "prompts")
_READING = ("text_encoder", "text_states")
"""What a text model reads its prompts with."""
_ALONE = {
    "labels_file": {"classes", "per_class"},
    "prompts": {"class_names", "templates", *_LABELS},
    "class_names": {*_LABELS},
}
"""What no other source of labels may stand beside."""
PolicyOptions = Annotated[dict[str, Scalar], FieldsOf(DepthPolicy)]


class ModelRequest(JobConfig):
    """A model, and what it is asked in words if it is one of text."""

    help_groups: ClassVar[tuple[HelpGroup, ...]] = (
        HelpGroup("text models", (*_IN_WORDS, *_READING, "image_size")),
    )
    model: ModelName = Field(
        "digits",
        description="name (var-d30, infinity-2b, ...), folder or file"
        f"\nnames are {', '.join(KNOWN_MODELS)}",
    )
    weights: Weights | None = Field(
        None,
        description="folder, file, URI or Hugging Face repository\nby default those that come with"
        " the model, or the public ones",
    )
    text_encoder: Weights | None = Field(
        None,
        description="T5 encoder of the prompts: folder, URI or Hugging Face repository"
        " (default: google/flan-t5-xl)",
    )
    text_states: Annotated[LocalPath, Metavar("FILE")] | None = Field(
        None,
        description="safetensors file with the states of all prompts, in place of an encoder",
    )
    class_names: Annotated[str, Metavar("CLASSES")] | None = Field(
        None,
        description='classes: "red fox,tabby cat", or a file of them\na line is `class` or'
        " `class<TAB>description`",
    )
    templates: JobFile | None = Field(
        None,
        description="file of lines such as `a photo of a {class}`\neach image gets one by chance"
        " (default: the class, and its description)",
    )
    prompts: JobFile | None = Field(
        None,
        description="file of prompts, one a line, or a table\nwith the columns prompt,class,count;"
        " in place of --class-names",
    )
    image_size: Annotated[str, Metavar("SIZE")] | None = Field(
        None,
        pattern=IMAGE_SIZE,
        description="pixels as SIDE or WIDTHxHEIGHT, one of the model's published sizes"
        " (default: its own)",
    )
    precision: Precision | None = Field(
        None, description=f"number type of the model (default: {DEFAULT_PRECISION})"
    )

    @field_validator("classes", "class_names", check_fields=False, mode="before")
    @classmethod
    def _classes_from_yaml(cls, value: object) -> object:
        """Accept `classes: [1, seven]` from YAML."""
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return ",".join(map(quoted, value))
        return value

    @model_validator(mode="after")
    def _one_source_of_text_states(self) -> ModelRequest:
        if self.text_states is not None and self.text_encoder is not None:
            raise ValueError(
                "text_states was given together with text_encoder, wanted one source of the"
                " prompts' states: drop one of them"
            )
        return self

    @model_validator(mode="after")
    def _one_source_of_labels(self) -> ModelRequest:
        """A file says classes and counts, or prompts; classes are those of a model or named."""
        given = self._given
        for name, others in _ALONE.items():
            if name in given and (doubled := sorted(given & others)):
                raise ValueError(
                    f"{name} was given together with {' and '.join(doubled)}, wanted one source"
                    " of labels: drop one of them"
                )
        if "templates" in given and "class_names" not in given:
            raise ValueError("templates was given without class_names: add the classes")
        return self

    @property
    def _given(self) -> set[str]:
        return {name for name in self.model_fields_set if getattr(self, name) is not None}

    def unfit_for(self, *, is_text: bool) -> str:
        """What is asked for in the words of the other kind of model, or missing; "" for nothing."""
        wrong = [
            name for name in (_LABELS if is_text else (*_WORDS, *_READING)) if name in self._given
        ]
        if wrong:
            return f"--{wrong[0].replace('_', '-')}"
        is_missing = is_text and not self._given & {*_WORDS}
        return "no classes and no prompts" if is_missing else ""


class GenerateConfig(ModelRequest):
    """What `depthvar generate` can be told, and `plan` and `submit` besides."""

    help_groups: ClassVar[tuple[HelpGroup, ...]] = (
        HelpGroup(
            "what to make",
            ("model", "weights", "classes", "per_class", "labels_file", "seed", "extend"),
        ),
        HelpGroup("what to make with a text model", _IN_WORDS, more=(*_READING, "image_size")),
        HelpGroup(
            "depth and sampling",
            ("policy", "reference_scale", "cfg", "precision", "batch_size"),
            more=("policy_options", "top_k", "top_p", "temperature"),
        ),
        HelpGroup(
            "files and machines",
            ("samples_per_shard", "image_format", "workers", "device", "address"),
            more=(
                *("png_level", "save_depth_maps", "contact_sheet", "encode_threads"),
                *("threads_per_worker", "kernels", "scratch", "max_attempts", "retry_failed"),
            ),
        ),
    )
    out: Location = Field(description="folder or URI (s3://, gs://, abfs://)")
    classes: str = Field(
        "all",
        description="ids, ranges, names or WordNet ids, such as 0-9,seven\nid:3 and name:3 where 3"
        " is the id of one and the name of another",
    )
    per_class: int = Field(
        100, gt=0, description="images of each class or prompt\na prompt may have its own count"
    )
    labels_file: JobFile | None = Field(
        None,
        description="lines `class[,count]`, in place of the two above",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="fixes the images\neach by its index")
    policy: str | None = Field(
        None,
        description=f"which tokens run how many blocks (default: {DEFAULT_PRESET}, of a text model"
        f" {TEXT_PRESET})\none of {', '.join(PRESETS)}: docs/policies.md",
    )
    reference_scale: int | None = Field(
        None,
        description="last scale at full depth, counted from 0: smaller is faster (default: the"
        " policy's own)\nof a text model, but for fastvar, the finest scale with a quarter of the"
        " last one's tokens",
    )
    policy_options: PolicyOptions = Field(
        default_factory=dict,
        description=f"options of the policy: {', '.join(OPTIONS)} (default: its own)",
    )
    cfg: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="guidance, 0 for none (default: the model's own)",
    )
    top_k: int | None = Field(
        None, ge=0, description="codes kept before top-p, 0 for all (default: the model's)"
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="probability mass kept, in (0, 1] (default: the model's)"
    )
    temperature: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="what guided logits are divided by (default: the model's)",
    )
    precision: Precision | None = Field(
        None,
        description="number type of the model (default: by device)\nfloat32, on GPUs float16, of a"
        " text model bfloat16",
    )
    save_depth_maps: bool = Field(
        False, description="also store how many blocks every token ran, as {key}.depth.npy"
    )
    samples_per_shard: int = Field(1000, gt=0, description="images of a tar file")
    batch_size: Annotated[int, Field(gt=0), Metavar("N")] | None = Field(
        None,
        description="images sampled at once (default: auto)"
        f"\nauto is {DEFAULT_BATCH_SIZE}, or as many as fit into a worker's memory",
    )
    image_format: ImageFormat = Field("png", description="encoding of the images")
    png_level: int = Field(
        DEFAULT_PNG_LEVEL,
        ge=0,
        le=9,
        description="effort of PNG's compression: 1 takes a fraction of the time for larger files",
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="workers (default: one per GPU, else per core)\n0: this process, without Ray",
    )
    threads_per_worker: int = Field(
        1, gt=0, description="CPU threads of one worker; another number may change the last bit"
    )
    encode_threads: int | None = Field(
        None,
        gt=0,
        description="threads of one worker that encode images (default: as many as its CPUs)",
    )
    device: Device = Field("auto", description="where the model runs")
    kernels: Kernels = Field(
        "auto",
        description="plain; graph: a batch recorded as one CUDA graph; or triton: recorded, its "
        "pointwise regions Triton's kernels (auto: graph on a GPU)",
    )
    address: str | None = Field(
        None,
        description="Ray cluster to join, HOST:6379, auto or local (default: $RAY_ADDRESS, else"
        " local)\nfrom one of its nodes; local is Ray on this machine",
    )
    scratch: LocalPath | None = Field(
        None, description="folder where shards are built (default: the system's temporary folder)"
    )
    max_attempts: int = Field(3, gt=0, description="failures after which a shard is set aside")
    retry_failed: bool = Field(
        False, description="try the shards again that an earlier run set aside"
    )
    extend: bool = Field(False, description="add images to a dataset that is planned with fewer")
    contact_sheet: int = Field(
        10, ge=0, description="images of each class or prompt on the contact sheet, 0 for none"
    )

    @property
    def left_open(self) -> frozenset[str]:
        """Fields of the plan that the workers decide: a stored plan's are as good as any."""
        return frozenset(n for n in ("batch_size", "precision") if getattr(self, n) is None)

    @field_validator("batch_size", mode="before")
    @classmethod
    def _fitted_batch_size(cls, value: object) -> object:
        return None if value == "auto" else value

    @model_validator(mode="after")
    def _png_level_of_pngs(self) -> GenerateConfig:
        """Other formats have no such level, and a plan holds nothing that decides no byte."""
        if self.image_format != "png" and self.png_level != DEFAULT_PNG_LEVEL:
            raise ValueError(
                f"png_level was given together with image_format {self.image_format}, wanted it"
                " with png: drop one of them"
            )
        return self

    @property
    def job_files(self) -> dict[str, Path]:
        """The files that the driver reads when it starts, by field."""
        named = {name: getattr(self, name) for name in ("labels_file", "templates", "prompts")}
        if self.class_names is not None:
            from pipeline.request.prompt_files import file_of_classes  # brings NumPy

            named["class_names"] = file_of_classes(self.class_names)
        return {name: path for name, path in named.items() if path is not None}


class PlanConfig(GenerateConfig):
    """What `depthvar plan` can be told: what `generate` can, and how to price it."""

    calibrate: bool = Field(
        False,
        description="time a few batches too: reads the weights\nhere or on a node of the cluster",
    )
    price_per_gpu_hour: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="to say a price, with --calibrate",
    )

    @model_validator(mode="after")
    def _priced_by_time(self) -> PlanConfig:
        if self.price_per_gpu_hour is not None and not self.calibrate:
            raise ValueError(
                "price_per_gpu_hour was given without calibrate, wanted both: add --calibrate"
            )
        return self


class SubmitConfig(GenerateConfig):
    """What `depthvar submit` can be told: what `generate` can, of another machine's cluster."""

    address: str | None = Field(
        None,
        description="dashboard of the cluster, http://HEAD:8265\n(default: $RAY_API_SERVER_ADDRESS,"
        " else http://127.0.0.1:8265, where `ray dashboard cluster.yaml` puts it)",
    )
    follow: bool = Field(True, description="show what the job says and end with its exit code")

    def for_cluster(self) -> dict[str, Any]:
        """What the job is told, as `generate` reads it from YAML."""
        told = self.model_dump(mode="json", exclude_unset=True, exclude={"address", "follow"})
        return {**told, "address": "auto"}
