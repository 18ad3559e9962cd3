"""How Hydra reads the files of configs/: strictly, and with every fault in one sentence that names the file."""

from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

from mbn.system.errors import ConfigError
from mbn.system.yaml_file import read_yaml


class _Strict(FileConfigSource):
    def load_config(self, config_path: str) -> ConfigResult:
        path = Path(self.path, self._normalize_file_name(config_path))
        content = read_yaml(path)
        if "hydra" in content:
            raise ConfigError(f"{path}: there is no setting 'hydra'.")
        if not _is_defaults_list(content.get("defaults", [])):
            raise ConfigError(f"{path}: defaults must be a list of lines such as - override /norm: bn.")
        try:
            header = self._get_header_dict(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ConfigError(f"{path}: {error}: write # @package _global_.") from None
        return ConfigResult(self.provider, f"{self.scheme()}://{self.path}", OmegaConf.create(content), header)


def _is_defaults_list(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, str) or (isinstance(entry, dict) and all(isinstance(v, str | None) for v in entry.values()))
        for entry in value
    )


def read_strictly() -> None:
    """Let Hydra read files through the class above. It has no public way for this: a scheme has one class."""
    Plugins.instance()  # registers Hydra's own classes, once
    SourcesRegistry.instance().types["file"] = _Strict
