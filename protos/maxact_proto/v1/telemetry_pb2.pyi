from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StreamRequest(_message.Message):
    __slots__ = ("layout", "window")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    layout: Layout
    window: Window
    def __init__(self, layout: _Optional[_Union[Layout, _Mapping]] = ..., window: _Optional[_Union[Window, _Mapping]] = ...) -> None: ...

class StreamResponse(_message.Message):
    __slots__ = ("layout_accepted", "window_ack")
    LAYOUT_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    WINDOW_ACK_FIELD_NUMBER: _ClassVar[int]
    layout_accepted: LayoutAccepted
    window_ack: WindowAck
    def __init__(self, layout_accepted: _Optional[_Union[LayoutAccepted, _Mapping]] = ..., window_ack: _Optional[_Union[WindowAck, _Mapping]] = ...) -> None: ...

class Site(_message.Message):
    __slots__ = ("layer", "name", "width", "sharded", "module", "limit")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    SHARDED_FIELD_NUMBER: _ClassVar[int]
    MODULE_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    layer: int
    name: str
    width: int
    sharded: bool
    module: str
    limit: float
    def __init__(self, layer: _Optional[int] = ..., name: _Optional[str] = ..., width: _Optional[int] = ..., sharded: bool = ..., module: _Optional[str] = ..., limit: _Optional[float] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("model", "engine", "instance", "tensor_parallel_rank", "tensor_parallel_size", "pipeline_parallel_rank", "pipeline_parallel_size", "sites", "dtype", "vllm_version", "maxact_version", "stats", "phases", "interval_seconds", "model_type", "histogram_bins")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_RANK_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_PARALLEL_RANK_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    VLLM_VERSION_FIELD_NUMBER: _ClassVar[int]
    MAXACT_VERSION_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    HISTOGRAM_BINS_FIELD_NUMBER: _ClassVar[int]
    model: str
    engine: str
    instance: str
    tensor_parallel_rank: int
    tensor_parallel_size: int
    pipeline_parallel_rank: int
    pipeline_parallel_size: int
    sites: _containers.RepeatedCompositeFieldContainer[Site]
    dtype: str
    vllm_version: str
    maxact_version: str
    stats: _containers.RepeatedScalarFieldContainer[str]
    phases: _containers.RepeatedScalarFieldContainer[str]
    interval_seconds: float
    model_type: str
    histogram_bins: int
    def __init__(self, model: _Optional[str] = ..., engine: _Optional[str] = ..., instance: _Optional[str] = ..., tensor_parallel_rank: _Optional[int] = ..., tensor_parallel_size: _Optional[int] = ..., pipeline_parallel_rank: _Optional[int] = ..., pipeline_parallel_size: _Optional[int] = ..., sites: _Optional[_Iterable[_Union[Site, _Mapping]]] = ..., dtype: _Optional[str] = ..., vllm_version: _Optional[str] = ..., maxact_version: _Optional[str] = ..., stats: _Optional[_Iterable[str]] = ..., phases: _Optional[_Iterable[str]] = ..., interval_seconds: _Optional[float] = ..., model_type: _Optional[str] = ..., histogram_bins: _Optional[int] = ...) -> None: ...

class LayoutAccepted(_message.Message):
    __slots__ = ("layout_id", "last_sequence")
    LAYOUT_ID_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    layout_id: int
    last_sequence: int
    def __init__(self, layout_id: _Optional[int] = ..., last_sequence: _Optional[int] = ...) -> None: ...

class Window(_message.Message):
    __slots__ = ("layout_id", "sequence", "start_seconds", "end_seconds", "tokens", "values", "lifetime", "coalesced", "histogram", "counts", "cached", "acknowledge_later")
    LAYOUT_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    START_SECONDS_FIELD_NUMBER: _ClassVar[int]
    END_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_FIELD_NUMBER: _ClassVar[int]
    COALESCED_FIELD_NUMBER: _ClassVar[int]
    HISTOGRAM_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGE_LATER_FIELD_NUMBER: _ClassVar[int]
    layout_id: int
    sequence: int
    start_seconds: float
    end_seconds: float
    tokens: _containers.RepeatedScalarFieldContainer[int]
    values: bytes
    lifetime: bytes
    coalesced: int
    histogram: bytes
    counts: bytes
    cached: int
    acknowledge_later: bool
    def __init__(self, layout_id: _Optional[int] = ..., sequence: _Optional[int] = ..., start_seconds: _Optional[float] = ..., end_seconds: _Optional[float] = ..., tokens: _Optional[_Iterable[int]] = ..., values: _Optional[bytes] = ..., lifetime: _Optional[bytes] = ..., coalesced: _Optional[int] = ..., histogram: _Optional[bytes] = ..., counts: _Optional[bytes] = ..., cached: _Optional[int] = ..., acknowledge_later: bool = ...) -> None: ...

class WindowAck(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...
