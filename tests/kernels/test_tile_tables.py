"""Tile tables: which one a device gets, what is wrong with a table, and that all programs of a process have one."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.matmul import linears_split_k
from kernels_pallas.platform import DEVICE_KINDS, device_kind, override_platform
from kernels_pallas.tile_tables import (
    ENVIRONMENT_VARIABLE,
    Entry,
    ExpertsConstants,
    GatedDeltaRuleConstants,
    MatmulConstants,
    TileTable,
    TileTableError,
    active_table,
    default_table,
    lookup,
    override_table,
    packaged_table,
    parse_table,
    table_fingerprint,
    tile_constants,
    user_table_path,
)
from kernels_pallas.tile_tables.constants import OPS
from scripts.gpu.cuda_target import CARDS
from tests.helpers.packed_weights import random_weight


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No table has been read yet, and the user has none."""
    monkeypatch.setattr(lookup, "_loaded", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def on(device: str) -> Any:
    return override_platform("cuda", (9, 0), device_kind=device, interpret=True)


def table_of(device: str, **constants: int) -> TileTable:
    """Return a table that has one entry for products."""
    return TileTable(device, "test", {"matmul": (Entry(MatmulConstants(**constants), "measured"),)})


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


class TestWhichTable:
    @pytest.mark.parametrize("kind", DEVICE_KINDS)
    def test_every_kind_has_one_in_the_package(self, kind: str) -> None:
        """Every entry says how it was found; products were measured on an H100, all else is predicted."""
        with on(kind):
            table = active_table()
        assert table.device == kind and table.ops.keys() == OPS.keys()
        entries = [entry for entries in table.ops.values() for entry in entries]
        assert all(entry.note for entry in entries)
        bases = {op: {entry.basis for entry in entries} for op, entries in table.ops.items()}
        assert bases.pop("matmul") == {"measured" if kind == "H100" else "predicted"}
        assert all(each == {"predicted"} for each in bases.values())

    def test_the_described_cards_are_kinds_of_devices(self) -> None:
        assert {card.name for card in CARDS.values()} == DEVICE_KINDS.keys()

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("NVIDIA H100 80GB HBM3", "H100"),
            ("NVIDIA H100 PCIe", "H100"),
            ("NVIDIA H200", "H200"),
            ("NVIDIA GH200 480GB", "NVIDIA GH200 480GB"),
            ("NVIDIA A100-SXM4-40GB", "A100"),
            ("NVIDIA A10", "NVIDIA A10"),
            ("NVIDIA GeForce RTX 3090", "RTX 3090"),
            ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 Laptop GPU"),
            ("NVIDIA GeForce RTX 5090", "RTX 5090"),
            ("NVIDIA B200", "B200"),
        ],
    )
    def test_the_drivers_names(self, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        class Device:
            device_kind = name

        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [Device])
        assert device_kind() == kind

    def test_other_devices_get_the_defaults(self) -> None:
        for device in ("", "NVIDIA L40S"):
            with on(device):
                assert active_table().ops == default_table().ops
                assert tile_constants("experts", 1024, 2048) == ExpertsConstants()
                assert tile_constants("gated_delta_rule") == GatedDeltaRuleConstants()

    def test_the_users_table_wins_and_ours_has_the_rest(self) -> None:
        path = write(user_table_path("H100"), table_of("H100", programs=1024).to_json())
        with on("H100"):
            assert tile_constants("matmul", 8192, 2048).programs == 1024
            assert tile_constants("experts", 1024, 2048) == packaged_table("H100").find("experts", 1024, 2048)
        with on("H200"):
            assert tile_constants("matmul", 8192, 2048) == packaged_table("H200").find("matmul", 8192, 2048)
        assert path.name == "h100.json"

    def test_the_environment_variable_wins_over_the_users_folder(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        write(user_table_path("RTX 4090"), table_of("RTX 4090", programs=1024).to_json())
        named = write(tmp_path / "mine.json", table_of("RTX 4090", programs=2048).to_json())
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(named))
        with on("RTX 4090"):
            assert tile_constants("matmul", 8192, 2048).programs == 2048

    def test_the_shape_of_the_weight_decides(self) -> None:
        small, wide, other = (MatmulConstants(programs=size) for size in (64, 128, 256))
        entries = (
            Entry(small, "measured", max_outputs=1024, max_inputs=2048),
            Entry(wide, "measured", max_outputs=4096),
            Entry(other, "measured"),
        )
        table = TileTable("", "test", {"matmul": entries})
        sizes = {(1024, 2048): small, (1025, 2048): wide, (1024, 2049): wide, (4096, 9999): wide, (4097, 1): other}
        assert all(table.find("matmul", *size) == constants for size, constants in sizes.items())


class TestWrongTables:
    """Each is an error that names the file, what was found and what to do."""

    good = json.loads(table_of("H100").to_json())

    def changed(self, change: Callable[[Any], None]) -> str:
        content = json.loads(json.dumps(self.good))
        change(content)
        return json.dumps(content)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.update(version=0), "its version is 0, expected 1"),
            (lambda t: t.pop("version"), "its version is None, expected 1"),
            (lambda t: t.update(device="A100"), "it is for the device 'A100', and this one is 'H100'"),
            (lambda t: t.update(speed=1), "the table has the unknown key 'speed'"),
            (lambda t: t.pop("source"), "the table has no 'source'"),
            (lambda t: t["ops"].update(conv=[]), "unknown op 'conv', expected matmul, experts"),
            (lambda t: t.update(ops=[]), "its ops are a list, expected an object"),
            (lambda t: t["ops"].update(matmul={}), "matmul is a dict, expected a list"),
            (lambda t: t["ops"].update(matmul=[3]), "matmul, entry 0: the entry is a int, expected an object"),
            (lambda t: t["ops"]["matmul"][0].update(constants=3), "constants are a int, expected an object"),
            (lambda t: t["ops"].update(matmul=[]), "matmul: the last entry must take weights of all sizes"),
            (lambda t: t["ops"]["matmul"][0].update(max_inputs=9), "matmul: the last entry must take weights of all"),
            (lambda t: t["ops"]["matmul"][0].update(max_inputs=0), "max_inputs is 0, expected a positive integer"),
            (lambda t: t["ops"]["matmul"][0].update(rows=9), "matmul, entry 0: the entry has the unknown key 'rows'"),
            (lambda t: t["ops"]["matmul"][0].update(basis="felt"), "basis is 'felt', expected one of measured"),
            (lambda t: t["ops"]["matmul"][0]["constants"].update(tile=8), "unknown key 'tile', expected programs"),
            (lambda t: t["ops"]["matmul"][0]["constants"].pop("programs"), "'programs' is missing"),
            (lambda t: t["ops"]["matmul"][0]["constants"].update(programs=500), "programs is 500, expected a power of"),
            (
                lambda t: t["ops"]["matmul"][0]["constants"].update(programs=2),
                "programs is 2, expected an integer",
            ),
            (lambda t: t["ops"]["matmul"][0]["constants"].update(stages_few=2.5), "stages_few is 2.5, expected an int"),
            (lambda t: t["ops"]["matmul"][0]["constants"].update(stages_few=True), "stages_few is True, expected an"),
            (
                lambda t: t["ops"].update(
                    gated_delta_rule=[{"basis": "measured", "note": "", "constants": {"state_columns": 4}}]
                ),
                "gated_delta_rule, entry 0: state_columns is 4, expected an integer from 8 to 64",
            ),
        ],
    )
    def test_what_it_says(self, change: Callable[[Any], None], message: str) -> None:
        write(user_table_path("H100"), self.changed(change))
        with on("H100"), pytest.raises(TileTableError) as caught:
            tile_constants("matmul", 8192, 2048)
        text = str(caught.value)
        assert message in text and str(user_table_path("H100")) in text and "mtpjax tune" in text

    @pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"version": 1, "device": "H100", "source": "", "ops": []}'])
    def test_what_is_no_table(self, text: str) -> None:
        write(user_table_path("H100"), text)
        with on("H100"), pytest.raises(TileTableError, match=r"h100\.json: .*mtpjax tune"):
            active_table()

    def test_files_that_cannot_be_read(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "none.json"))
        with on("H100"), pytest.raises(TileTableError, match=rf"none\.json named by {ENVIRONMENT_VARIABLE}: .* unset"):
            active_table()
        monkeypatch.delenv(ENVIRONMENT_VARIABLE)
        user_table_path("H100").mkdir(parents=True)
        with on("H100"), pytest.raises(TileTableError, match=r"h100\.json: it cannot be read .* delete it"):
            active_table()

    def test_a_toy_table_is_for_the_cpu_only(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for device in ("cpu", "H100"):
            toy = TileTable(device, "toy", {"matmul": (Entry(MatmulConstants(programs=64), "toy"),)})
            write(tmp_path / f"{device}.json", toy.to_json())
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "H100.json"))
        with on("H100"), pytest.raises(TileTableError, match=r"H100\.json: it was measured at toy size"):
            active_table()
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "cpu.json"))
        with override_platform("cpu"):
            assert tile_constants("matmul", 1, 1).programs == 64

    def test_an_unknown_op(self) -> None:
        with pytest.raises(ValueError, match="no tile constants for 'conv'; expected one of matmul, experts"):
            tile_constants("conv", 1, 1)  # type: ignore[call-overload]

    def test_the_text_of_a_table_is_read_back(self) -> None:
        table = packaged_table("H100")
        assert parse_table(table.to_json(), "here", "H100") == table
        assert all(
            asdict(default_table().find(op)).keys() == {f.name for f in fields(kind)} for op, kind in OPS.items()
        )


class TestOneTableForAProcess:
    """Constants are the order of sums: two programs with two tables would give a row two results."""

    def partial_sums(self, rows: int) -> np.ndarray:
        x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, 1024)), jnp.bfloat16)
        run = jax.jit(lambda x, w: linears_split_k(x, w, out_dtypes=[jnp.float32], implementation="triton")[0].parts)
        return np.asarray(run(x, random_weight("iq4_nl", (1024, 1024))))

    def test_a_file_written_later_changes_nothing(self) -> None:
        with on("H100"):
            before, fingerprint = self.partial_sums(5), table_fingerprint()
            write(user_table_path("H100"), table_of("H100", programs=16).to_json())
            after = self.partial_sums(5)
            assert before.shape == after.shape == (4, 5, 1024) and (before == after).all()
            assert table_fingerprint() == fingerprint

    def test_a_variable_set_later_is_an_error(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        path = write(tmp_path / "late.json", table_of("H100", programs=16).to_json())
        with on("H100"):
            self.partial_sums(5)
            monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(path))
            with pytest.raises(TileTableError, match=rf"{ENVIRONMENT_VARIABLE} was None .* is now .*late\.json"):
                self.partial_sums(5)

    def test_the_table_is_what_decides(self) -> None:
        with on("H100"), override_table(table_of("H100", programs=16)):
            assert self.partial_sums(5).shape == (1, 5, 1024)
            assert (
                table_fingerprint() != lookup.hashlib.sha256(packaged_table("H100").to_json().encode()).hexdigest()[:16]
            )


def test_the_tables_are_in_the_package() -> None:
    """The wheel takes JSON files of packages; see `package-data` in pyproject.toml."""
    folder = Path(lookup.__file__).parent
    assert len(list(folder.glob("*.json"))) == len(DEVICE_KINDS) and (folder / "__init__.py").exists()
    assert '"*.json"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert os.access(folder / "h100.json", os.R_OK)
