"""CRC-32C (Castagnoli), which guards TFRecord files, fast enough in NumPy to check every byte.

A CRC is linear over GF(2), and zeros in front of a message do not change it. So a long message is
cut into many short lanes, which go through the table side by side, and neighbours are then joined:
the left one is moved on by as many zero bytes as the right one is long.
"""

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78  # reflected
_LANE = 64  # bytes


def _table() -> np.ndarray:
    rows = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        rows = (rows >> 1) ^ np.where(rows & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return rows


_TABLE = _table()
_PLAIN_TABLE = _TABLE.tolist()


def crc32c(data: bytes) -> int:
    """The checksum of some bytes."""
    if len(data) < 8 * _LANE:
        state = 0xFFFFFFFF
        for byte in data:
            state = _PLAIN_TABLE[(state ^ byte) & 0xFF] ^ (state >> 8)
        return state ^ 0xFFFFFFFF
    lanes = 1 << (-(-len(data) // _LANE) - 1).bit_length()
    padded = np.zeros(lanes * _LANE, np.uint8)
    padded[-len(data) :] = np.frombuffer(data, np.uint8)
    padded[-len(data) :][:4] ^= 0xFF  # the register starts from ones
    state = np.zeros(lanes, np.uint32)
    for column in padded.reshape(lanes, _LANE).T:
        state = _TABLE[(state ^ column) & 0xFF] ^ (state >> 8)
    length = _LANE
    while len(state) > 1:
        state = _behind_zeros(state[0::2], length) ^ state[1::2]
        length *= 2
    return int(state[0]) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """The checksum as TFRecord files store it: rotated, and moved by a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _behind_zeros(state: np.ndarray, length: int) -> np.ndarray:
    """Registers after so many zero bytes, a power of two."""
    moved = np.zeros_like(state)
    for place, table in enumerate(_zeros_tables(length)):
        moved ^= table[(state >> 8 * place) & 0xFF]
    return moved


@functools.lru_cache(maxsize=32)
def _zeros_tables(length: int) -> np.ndarray:
    """What each byte of a register becomes after so many zero bytes, uint32 [4, 256]."""
    state = np.arange(256, dtype=np.uint32) << 8 * np.arange(4, dtype=np.uint32)[:, None]
    if length == 1:
        return _TABLE[state & 0xFF] ^ (state >> 8)
    return _behind_zeros(_behind_zeros(state, length // 2), length // 2)
