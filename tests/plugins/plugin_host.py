"""TensorRT's plugin objects from Python, through ``plugin_host/plugin_host.cpp``: what TensorRT does with them."""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

# nvinfer1::DataType and nvinfer1::PluginFieldType.
TYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.int8: 2,
    torch.int32: 3,
    torch.bool: 4,
    torch.bfloat16: 7,
    torch.int64: 8,
}
_FLOAT32, _INT32, _CHAR = 1, 5, 6
_LINEAR = 0


class _Field(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 8),
        ("data", ctypes.c_void_p),
    )


class PluginHost:
    """A plugin library, opened as TensorRT's registry does."""

    def __init__(self, host: Path, plugins: Path) -> None:
        self._library = ctypes.CDLL(str(host))
        for name in ("open", "create", "clone", "attach", "through_engine"):
            getattr(self._library, f"host_{name}").restype = ctypes.c_void_p
        for name in ("describe", "log", "metadata"):
            getattr(self._library, f"host_{name}").restype = ctypes.c_char_p
        self._library.host_workspace.restype = ctypes.c_int64
        self._host = ctypes.c_void_p(self._library.host_open(str(plugins).encode()))
        assert self._host.value, plugins

    def creators(self) -> dict[str, tuple[str, str, str, set[str]]]:
        """Version, namespace, kind and attributes of every creator."""
        described = [
            self._library.host_describe(self._host, index).decode().rsplit(" ", 1)
            for index in range(self._library.host_creators(self._host))
        ]
        found = {}
        for text, attributes in described:
            name, version, namespace, kind = text.split(" ", 3)
            found[name] = (version, namespace, kind, set(attributes.strip(",").split(",")))
        return found

    def log(self) -> str:
        return self._library.host_log(self._host).decode()

    def create(
        self, name: str, attributes: Mapping[str, str | float | int | Sequence[int]]
    ) -> "Plugin | None":
        """A plugin of attributes as TensorRT's parser passes them: texts with a zero at the end, int32."""
        fields = (_Field * len(attributes))()
        kept = []
        for field, (key, value) in zip(fields, attributes.items(), strict=True):
            if isinstance(value, str):
                data, field.type, field.length = (
                    ctypes.create_string_buffer(value.encode()),
                    _CHAR,
                    len(value) + 1,
                )
            elif isinstance(value, float):
                data, field.type, field.length = (ctypes.c_float * 1)(value), _FLOAT32, 1
            else:
                numbers = [value] if isinstance(value, int) else list(value)
                data = (ctypes.c_int32 * len(numbers))(*numbers)
                field.type, field.length = _INT32, len(numbers)
            kept.append(data)
            field.name, field.data = key.encode(), ctypes.cast(data, ctypes.c_void_p)
        return self._plugin(self._library.host_create(self._host, name.encode(), fields, len(attributes)))

    def _plugin(self, pointer: int | None) -> "Plugin | None":
        return Plugin(self, self._library, self._host, pointer) if pointer else None


class Plugin:
    """One plugin object; it is deleted with this one."""

    def __init__(self, host: PluginHost, library: ctypes.CDLL, handle: ctypes.c_void_p, pointer: int) -> None:
        self._owner, self._library, self._host = host, library, handle
        self._pointer = ctypes.c_void_p(pointer)

    def __del__(self) -> None:
        self._library.host_destroy(self._pointer)

    def clone(self) -> "Plugin":
        return self._owner._plugin(self._library.host_clone(self._pointer))

    def attached(self) -> "Plugin":
        return self._owner._plugin(self._library.host_attach(self._pointer))

    def through_engine(self) -> "Plugin":
        """What is made of the fields that an engine keeps."""
        return self._owner._plugin(self._library.host_through_engine(self._host, self._pointer))

    @property
    def metadata(self) -> str:
        return self._library.host_metadata(self._pointer).decode()

    def infer(self, inputs: Sequence[Tensor]) -> list[Tensor] | None:
        """Outputs of the shapes and types that the plugin says, filled with garbage; None if it refuses."""
        count = self._library.host_outputs(self._pointer)
        described = (_Tensor * count)()
        if self._library.host_infer(
            self._pointer, _array(inputs), len(inputs), ctypes.byref(described), count
        ):
            return None
        by_code = {code: dtype for dtype, code in TYPES.items()}
        return [torch.full(list(one.dims[: one.rank]), 77, dtype=by_code[one.type]) for one in described]

    def supports(
        self, position: int, tensors: Sequence[Tensor], outputs: int, *, linear: bool = True
    ) -> bool:
        array = _array(tensors)
        if not linear:
            array[position].format = 1
        return bool(
            self._library.host_supports(self._pointer, position, array, len(tensors) - outputs, outputs)
        )

    def configure(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        return not self._library.host_configure(
            self._pointer, _array(inputs), len(inputs), _array(outputs), len(outputs)
        )

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        """Fill the outputs; False if the plugin reports an error."""
        sizes = (_array(inputs), len(inputs), _array(outputs), len(outputs))
        workspace = ctypes.create_string_buffer(max(1, self._library.host_workspace(self._pointer, *sizes)))
        return not self._library.host_run(self._pointer, *sizes, workspace)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Run as TensorRT does, having asked first whether every tensor's type is taken."""
        outputs = self.infer(inputs)
        assert outputs is not None, self._owner.log()
        for position in range(len(inputs) + len(outputs)):
            assert self.supports(position, [*inputs, *outputs], len(outputs)), position
        assert self.configure(inputs, outputs), self._owner.log()
        assert self.run(inputs, outputs), self._owner.log()
        return outputs


def _array(tensors: Sequence[Tensor]) -> ctypes.Array:
    array = (_Tensor * max(1, len(tensors)))()
    for one, tensor in zip(array, tensors, strict=False):
        assert tensor.is_contiguous()
        one.type, one.format, one.rank = TYPES[tensor.dtype], _LINEAR, tensor.dim()
        one.dims[: tensor.dim()] = list(tensor.shape)
        one.data = tensor.data_ptr()
    return array
