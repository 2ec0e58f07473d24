"""Damaged models, graphs and requests: each a clear error with a stable code, and nothing half-written.

Every case runs the program as a person would, on a copy of the default model with one thing wrong.
"""

import json
import signal
import struct
import sys
from pathlib import Path

import numpy
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from program import (
    DEMO, GRAPHS, SMALL, copy_of, edit_json, error_of, files_in, pictures, read_safetensors, run, take, whole_text,
    write_safetensors,
)

UNET = "unet/diffusion_pytorch_model.safetensors"
INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"
RANDOM = bytes(numpy.random.default_rng(1).integers(0, 256, 20_000, dtype=numpy.uint8))


class Place:
    """A folder with a model and graphs to damage; the pictures go to `out`, the latents beside it."""

    def __init__(self, root: Path):
        self.root, self.out, self.latents = root, root / "out", root / "latents.safetensors"

    @property
    def model(self) -> Path:
        folder = self.root / "model"
        return folder if folder.exists() else copy_of(DEMO, folder)

    @property
    def graphs(self) -> Path:
        folder = self.root / "graphs"
        return folder if folder.exists() else copy_of(GRAPHS, folder)

    def generate(self, *arguments: object, **options):
        """One small picture with whichever of the two were copied, the intact ones for the rest."""
        chosen = []
        for option in ("model", "graphs"):
            if (self.root / option).exists():
                chosen += [f"--{option}", self.root / option]
        fixed = [*chosen, "--output", self.out, "--save-latents", self.latents]
        return run("generate", *arguments, *fixed, cwd=self.root, **options)

    def fails(self, status: int, code: str, *arguments: object, **options) -> dict:
        """Runs into the error that is expected, and leaves nothing behind."""
        result = self.generate(*(arguments or ("--prompt", "a fox", *SMALL)), **options)
        error = error_of(result, status, code)
        assert files_in(self.out) == [] and not self.latents.exists()
        assert str(self.root) not in error["error_traceback"], "the causes name no paths"
        return error


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def graph(folder: Path, component: str) -> Path:
    (path,) = folder.glob(f"{component}-*.pt")
    return path


# --- Weight files -----------------------------------------------------------------------------------------------------

WHOLE = (DEMO / UNET).read_bytes()

FILES = {
    "cut short": WHOLE[:-1000],
    "longer than the header says": WHOLE + b"xx",
    "empty": b"",
    "a header that is no JSON": struct.pack("<Q", 64) + b"{" * 64 + bytes(256),
    "a header of 10 GB": struct.pack("<Q", 10_000_000_000) + WHOLE[8:],
    "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5499568\n",
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_damaged_weight_file_is_named(place: Place, content: bytes):
    (place.model / UNET).write_bytes(content)
    error = place.fails(3, "weights_damaged")
    assert str(place.model / UNET) in error["message"]
    assert "safetensors" in error["message"] and error["error_traceback"]
    assert "download" in error["remedy"]


def test_a_shape_that_does_not_fit_its_bytes_is_damage(place: Place):
    header, data = read_safetensors(place.model / UNET)
    header["conv_in.weight"]["shape"] = [2**40, 2**40]
    write_safetensors(place.model / UNET, header, data)
    assert UNET in place.fails(3, "weights_damaged")["message"]


def test_tensors_that_overlap_are_damage(place: Place):
    header, data = read_safetensors(place.model / UNET)
    header["conv_norm_out.bias"]["data_offsets"] = header["conv_norm_out.weight"]["data_offsets"]
    write_safetensors(place.model / UNET, header, data)
    assert UNET in place.fails(3, "weights_damaged")["message"]


def test_weights_that_are_not_there_are_missing_by_every_name_that_was_tried(place: Place):
    (place.model / UNET).unlink()
    error = place.fails(3, "weights_missing")
    assert str(place.model / "unet") in error["message"] and "diffusion_pytorch_model.safetensors" in error["message"]


def test_a_wrong_shape_is_told_with_both_shapes(place: Place):
    header, data = read_safetensors(place.model / UNET)
    assert header["conv_in.weight"]["shape"] == [48, 4, 3, 3]
    header["conv_in.weight"]["shape"] = [3, 3, 4, 48]
    write_safetensors(place.model / UNET, header, data)
    error = place.fails(3, "weights_mismatch")
    assert "1 mis-shaped: conv_in.weight is [3, 3, 4, 48], the graph wants [48, 4, 3, 3]" in error["message"]
    assert "unet" in error["message"] and "export.py" in error["remedy"]


def test_missing_and_unexpected_tensors_are_told_apart(place: Place):
    header, data = read_safetensors(place.model / UNET)
    header["surprise.weight"] = header.pop("conv_in.weight")
    write_safetensors(place.model / UNET, header, data)
    message = place.fails(3, "weights_mismatch")["message"]
    assert "1 missing: conv_in.weight" in message and "1 unexpected: surprise.weight" in message


def test_a_missing_tensor_alone_is_an_error(place: Place):
    header, data = read_safetensors(place.model / UNET)
    write_safetensors(place.model / UNET, *take(header, data, [name for name in header if name != "conv_in.bias"]))
    message = place.fails(3, "weights_mismatch")["message"]
    assert message.endswith("1 missing: conv_in.bias")


def test_an_unexpected_tensor_alone_is_an_error(place: Place):
    path = place.model / "text_encoder_2" / "model.safetensors"
    header, data = read_safetensors(path)
    header["text_model.surprise"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    write_safetensors(path, header, data + bytes(4))
    message = place.fails(3, "weights_mismatch")["message"]
    assert message.endswith("1 unexpected: text_model.surprise") and "text_encoder_2" in message


def test_a_long_list_of_missing_tensors_is_cut_and_counted(place: Place):
    header, data = read_safetensors(place.model / UNET)
    gone = sorted(header)[:25]
    write_safetensors(place.model / UNET, *take(header, data, [name for name in header if name not in gone]))
    message = place.fails(3, "weights_mismatch")["message"]
    assert f"25 missing: {', '.join(gone[:10])} and 15 more" in message
    assert gone[10] not in message


def test_weights_that_are_not_finite_are_an_error_and_no_black_picture(place: Place):
    header, data = read_safetensors(place.model / UNET)
    write_safetensors(place.model / UNET, header, b"\xff" * len(data))
    assert "weights" in place.fails(1, "non_finite_latents")["message"]


# --- Shards and variants ----------------------------------------------------------------------------------------------


def shard(model: Path, variant: str = "") -> list[Path]:
    """The UNet as two files and an index, as `save_pretrained` names them."""
    header, data = read_safetensors(model / UNET)
    names, paths, weight_map = sorted(header), [], {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        paths.append(model / "unet" / f"diffusion_pytorch_model{variant}-0000{number}-of-00002.safetensors")
        write_safetensors(paths[-1], *take(header, data, part))
        weight_map |= {name: paths[-1].name for name in part}
    (model / UNET).unlink()
    (model / INDEX).write_text(json.dumps({"metadata": {"total_size": len(data)}, "weight_map": weight_map}))
    return paths


def test_a_missing_shard_is_named(place: Place):
    gone = shard(place.model)[1]
    gone.unlink()
    error = place.fails(3, "weights_damaged")
    assert gone.name in error["message"] and "index.json" in error["message"]
    assert "download" in error["remedy"]


def test_a_damaged_shard_is_named(place: Place):
    damaged = shard(place.model)[0]
    damaged.write_bytes(damaged.read_bytes()[:-4])
    assert damaged.name in place.fails(3, "weights_damaged")["message"]


@pytest.mark.parametrize("text", ["{{", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_named(place: Place, text: str):
    shard(place.model)
    (place.model / INDEX).write_text(text)
    error = place.fails(3, "weights_damaged")
    assert str(place.model / INDEX) in error["message"] and error["error_traceback"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> numpy.ndarray:
    """The latents of the intact model."""
    return latents(Place(tmp_path_factory.mktemp("plain")))


def latents(place: Place, *arguments: str) -> numpy.ndarray:
    pictures(place.generate("--prompt", "a fox", "--seed", "3", *SMALL, *arguments), place.root)
    return load_file(place.latents)["latents"]


def distance(ours: numpy.ndarray, theirs: numpy.ndarray) -> float:
    return float(numpy.linalg.norm(ours - theirs) / numpy.linalg.norm(theirs))


# The same numbers from another place in memory: kernels choose their way by the alignment, which moves the last bit.
SAME = 1e-5


def test_shards_give_the_same_latents(place: Place, plain: numpy.ndarray):
    shard(place.model)
    assert distance(latents(place), plain) < SAME


def test_files_that_all_carry_a_variant_are_found_without_being_asked_for(place: Place, plain: numpy.ndarray):
    for path in list(place.model.rglob("*.safetensors")):
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert distance(latents(place), plain) < SAME


def test_a_variant_beside_the_plain_files_is_read_where_it_is_asked_for(place: Place, plain: numpy.ndarray):
    for path in list(place.model.rglob("*.safetensors")):
        others = {name: (tensor * 1.001).astype(numpy.float16) for name, tensor in load_file(path).items()}
        save_file(others, path.with_suffix(".fp16.safetensors"))
    assert distance(latents(place), plain) < SAME
    assert 1e-5 < distance(latents(place, "--variant", "fp16"), plain) < 0.1


def test_tensors_that_are_not_aligned_give_the_same_latents(place: Place, plain: numpy.ndarray):
    for path in place.model.rglob("*.safetensors"):
        header, data = read_safetensors(path)
        length = 8 + len(json.dumps(header))
        write_safetensors(path, header, data, padding=1 - length % 2)
        assert (path.stat().st_size - len(data)) % 2 == 1
    assert distance(latents(place), plain) < SAME


def test_text_encoders_of_the_other_transformers_generation_give_the_same_latents(place: Place, plain: numpy.ndarray):
    for folder in ("text_encoder", "text_encoder_2"):
        path = place.model / folder / "model.safetensors"
        header, data = read_safetensors(path)
        prefixed = any(name.startswith("text_model.") for name in header)
        renamed = {}
        for name, entry in header.items():
            whole = prefixed or name.startswith("text_projection.")
            renamed[name.removeprefix("text_model.") if whole else f"text_model.{name}"] = entry
        assert renamed.keys() != header.keys()
        write_safetensors(path, renamed, data)
    assert distance(latents(place), plain) < SAME


# --- Graphs -----------------------------------------------------------------------------------------------------------


def test_graphs_of_another_architecture_name_the_keys_and_the_command(place: Place):
    edit_json(place.model / "unet" / "config.json", cross_attention_dim=2048, norm_num_groups=4)
    error = place.fails(3, "no_matching_graph")
    assert "unet" in error["message"] and str(GRAPHS) in error["message"]
    assert "cross_attention_dim is 128 in the graph, 2048 in the model" in error["message"]
    assert "norm_num_groups is 16 in the graph, 4 in the model" in error["message"]
    assert "block_out_channels" not in error["message"]
    command = f"python torchscript/export.py --model {place.model} --dtype float32 --out {GRAPHS}"
    assert command in error["remedy"]


def test_graphs_without_a_component_say_so(place: Place):
    manifest = json.loads((place.graphs / "manifest.json").read_text())
    manifest["graphs"] = [entry for entry in manifest["graphs"] if entry["component"] != "vae_decoder"]
    (place.graphs / "manifest.json").write_text(json.dumps(manifest))
    error = place.fails(3, "no_matching_graph")
    assert "vae_decoder" in error["message"] and "export.py" in error["remedy"]


def test_a_manifest_that_is_none_is_named(place: Place):
    (place.graphs / "manifest.json").write_text("{]")
    error = place.fails(3, "graphs_invalid")
    assert str(place.graphs / "manifest.json") in error["message"] and "export.py" in error["remedy"]


def test_a_manifest_of_another_format_is_told_by_its_number(place: Place):
    (place.graphs / "manifest.json").write_text('{"format": 7, "graphs": {"of another": "shape"}}')
    error = place.fails(3, "graphs_invalid")
    assert "format 7" in error["message"] and "export.py" in error["remedy"]


def test_a_folder_without_graphs_is_named(place: Place):
    (place.graphs / "manifest.json").unlink()
    error = place.fails(3, "graphs_not_found")
    assert str(place.graphs) in error["message"] and "export.py" in error["remedy"]


@pytest.mark.parametrize("damage", ["gone", "random bytes", "cut short"])
def test_a_damaged_graph_file_is_named(place: Place, damage: str):
    path = graph(place.graphs, "unet")
    whole = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(RANDOM if damage == "random bytes" else whole[: len(whole) // 2])
    error = place.fails(3, "graphs_invalid")
    assert str(path) in error["message"] and "export.py" in error["remedy"]


def test_a_graph_of_something_else_under_the_name_is_found_out(place: Place):
    graph(place.graphs, "unet").write_bytes(graph(place.graphs, "vae_decoder").read_bytes())
    error = place.fails(3, "graphs_invalid")
    assert graph(place.graphs, "unet").name in error["message"] and "parameters" in error["message"]


# --- Configuration and tokenizers -------------------------------------------------------------------------------------


def test_a_model_that_is_not_there_is_named(place: Place):
    error = place.fails(3, "model_not_found", "--prompt", "a", "--model", "/nowhere/sdxl")
    assert "/nowhere/sdxl" in error["message"] and "--model" in error["remedy"]


CONFIGURATIONS = ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_that_is_no_json_is_named(place: Place, name: str):
    (place.model / name).write_text('{"a":')
    error = place.fails(3, "model_invalid")
    assert str(place.model / name) in error["message"] and error["error_traceback"]


def test_a_configuration_that_is_not_there_is_named(place: Place):
    (place.model / "unet" / "config.json").unlink()
    error = place.fails(3, "model_invalid")
    assert str(place.model / "unet" / "config.json") in error["message"] and error["error_traceback"]


def test_a_value_that_the_scheduler_does_not_know_is_no_guess(place: Place):
    edit_json(place.model / "scheduler" / "scheduler_config.json", beta_schedule="wavy")
    error = place.fails(3, "model_invalid")
    assert "scheduler_config.json" in error["message"]
    assert "wavy" in whole_text(error) and "scaled_linear" in whole_text(error)


def test_a_scheduler_class_that_nobody_knows_is_named_with_those_that_are(place: Place):
    edit_json(place.model / "scheduler" / "scheduler_config.json", _class_name="ElephantScheduler")
    error = place.fails(3, "unsupported_model")
    assert "ElephantScheduler" in error["message"] and "euler" in whole_text(error)


def test_a_unet_for_another_task_is_refused_by_name(place: Place):
    edit_json(place.model / "unet" / "config.json", in_channels=8)
    error = place.fails(3, "unsupported_model")
    assert "in_channels" in error["message"]


@pytest.mark.parametrize("name, text", [("vocab.json", None), ("vocab.json", '{"a'), ("merges.txt", "#version\na b c")])
def test_a_damaged_tokenizer_is_named(place: Place, name: str, text: str | None):
    path = place.model / "tokenizer_2" / name
    path.unlink()
    if text is not None:
        path.write_text(text)
    error = place.fails(3, "model_invalid")
    assert str(path.parent) in error["message"] and name in error["remedy"] and error["error_traceback"]


def test_a_damaged_tokenizer_json_is_named(place: Place):
    (place.model / "tokenizer" / "tokenizer.json").write_text("{}")
    error = place.fails(3, "model_invalid")
    assert str(place.model / "tokenizer") in error["message"]


def test_a_tokenizer_configuration_that_is_no_json_is_named(place: Place):
    (place.model / "tokenizer" / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json" in place.fails(3, "model_invalid")["message"]


def test_a_vocabulary_larger_than_the_encoder_is_an_error_of_the_model(place: Place):
    path = place.model / "tokenizer" / "vocab.json"
    path.write_text(json.dumps({token: id + 900 for token, id in json.loads(path.read_text()).items()}))
    assert "tokenizer" in place.fails(3, "model_invalid")["message"]


@pytest.mark.parametrize("length", [10, 513])
def test_a_tokenizer_of_another_length_than_the_encoder_is_an_error_of_the_model(place: Place, length: int):
    edit_json(place.model / "tokenizer_2" / "tokenizer_config.json", model_max_length=length)
    assert str(length) in place.fails(3, "model_invalid")["message"]


# --- Requests ---------------------------------------------------------------------------------------------------------


def test_a_request_that_is_no_json_is_an_error(place: Place):
    error = place.fails(2, "invalid_json", "--input", "-", stdin='{"prompt": ')
    assert error["field"] == "--input" and error["error_traceback"]


def test_a_request_that_is_no_object_is_an_error(place: Place):
    assert place.fails(2, "invalid_type", "--input", "-", stdin="[1]")["field"] == "--input"


def test_a_request_file_that_is_not_there_is_named(place: Place):
    error = place.fails(2, "unreadable_file", "--input", "/nowhere/request.json")
    assert "/nowhere/request.json" in error["message"]


REQUESTS = {
    "an unknown scheduler": ({"scheduler": "eulr"}, "unknown_scheduler", "scheduler", "euler"),
    "a width of a million": ({"width": 1_000_001}, "out_of_range", "width", "16376"),
    "more pixels than are allowed": ({"width": 4096, "height": 4096}, "too_large", "width", "4194304"),
    "a width that is no multiple of 8": ({"width": 100}, "not_a_multiple", "width", "96"),
    "an empty prompt": ({"prompt": "  \n"}, "empty_prompt", "prompt", "describe"),
    "an unknown field": ({"promt": "x"}, "unknown_field", "promt", "`prompt`"),
    "a picture that is none": ({"image": "data:image/png;base64,AAAA", "strength": 1}, "image_format", "image", "PNG"),
    "a control with a net that is not there": (
        {"controlnets": [{"image": "x", "model": "x"}]},
        "controlnet_not_available",
        "controlnets[0].model",
        "--controlnet",
    ),
    "loras": ({"loras": [{"name": "x"}]}, "lora_not_found", "loras[0].name", "--lora-dir"),
    "a refiner": ({"refiner": {}}, "refiner_not_available", "refiner", "leave"),
}


@pytest.mark.parametrize("fields, code, field, words", REQUESTS.values(), ids=REQUESTS)
def test_a_wrong_request_names_the_field_and_the_way_out(place: Place, fields: dict, code: str, field: str, words: str):
    request = {"prompt": "a fox", "num_inference_steps": 1} | fields
    error = place.fails(2, code, "--input", "-", stdin=json.dumps(request))
    assert error["field"] == field
    assert words in whole_text(error)


def test_a_request_is_judged_before_the_model_is_read(place: Place):
    (place.model / UNET).write_bytes(b"")
    for request, code in (({"promt": "x"}, "unknown_field"), ({"prompt": "a", "seed": "x"}, "invalid_type")):
        place.fails(2, code, "--input", "-", stdin=json.dumps(request))


def test_more_memory_than_is_allowed_is_refused_with_both_figures(place: Place):
    error = place.fails(2, "memory_limit", "--prompt", "a fox", "--memory-limit", "1M")
    assert "128x128" in error["message"] and "the configured limit is 1.0 MB" in error["message"]
    needed = error["message"].split("needs about ")[1].split(",")[0]
    assert needed != "1 MB" and "--memory-limit" in error["remedy"]


@pytest.mark.parametrize("device", ["cuda:0", "cuda:99"])
def test_a_device_that_is_not_there_is_an_error_and_no_slow_surprise(place: Place, device: str):
    if device == "cuda:0" and Path("/dev/nvidiactl").exists():
        pytest.skip("this machine may have CUDA")
    error = place.fails(3, "device_not_available", "--prompt", "a fox", "--device", device)
    assert device in error["message"] and "--device cpu" in error["remedy"]


# --- Pictures to start from -------------------------------------------------------------------------------------------


def test_a_picture_of_somebody_else_has_no_parameters(place: Place):
    Image.new("RGB", (8, 8)).save(place.root / "picture.jpg")
    assert "picture" in place.fails(2, "no_parameters", "--from", place.root / "picture.jpg")["message"]


def test_a_damaged_picture_and_a_file_that_is_none_are_told_apart(place: Place):
    picture = place.root / "picture.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + RANDOM[:100])
    place.fails(2, "damaged_picture", "--from", picture)
    picture.write_text("a text")
    place.fails(2, "unknown_picture_format", "--from", picture)
    picture.unlink()
    assert str(picture) in place.fails(2, "unreadable_file", "--from", picture)["message"]


# --- Where the pictures go --------------------------------------------------------------------------------------------


def unwritable(place: Place, *arguments: object) -> dict:
    """Fails on the folder, and before the work: an unwritable folder is found out without a model."""
    result = run("generate", "--prompt", "a fox", *SMALL, *arguments, cwd=place.root)
    error = error_of(result, 3, "output_unwritable")
    assert "model loaded" not in result.stderr
    assert str(place.root) not in error["error_traceback"]
    return error


def test_a_file_in_the_folders_place_is_told_before_the_work(place: Place):
    place.out.write_text("somebody's notes")
    assert str(place.out) in unwritable(place, "--output", place.out)["message"]
    assert str(place.out / "below") in unwritable(place, "--output", place.out / "below")["message"]
    assert place.out.read_text() == "somebody's notes"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, where nobody may write")
def test_a_folder_nobody_may_write_to_is_told_before_the_work(place: Place):
    folder = "/proc/pictures"
    assert folder in unwritable(place, "--output", folder)["message"]
    error = unwritable(place, "--output", place.out, "--save-latents", f"{folder}/latents.safetensors")
    assert folder in error["message"] and "--save-latents" in error["remedy"]
    assert files_in(place.out) == []


def test_latents_that_would_replace_a_folder_are_told_before_the_work(place: Place):
    place.latents.mkdir()
    assert str(place.latents) in unwritable(place, "--output", place.out, "--save-latents", place.latents)["message"]
    assert files_in(place.out) == [] and files_in(place.latents) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
def test_a_full_disk_leaves_no_half_of_a_picture(place: Place):
    import resource

    def small_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    arguments = ("--prompt", "a fox", *SMALL, "--num-images", "2", "--output", place.out)
    error = error_of(run("generate", *arguments, cwd=place.root, preexec_fn=small_disk), 3, "output_unwritable")
    assert str(place.out) in error["message"] and error["error_traceback"]
    assert files_in(place.out) == []
