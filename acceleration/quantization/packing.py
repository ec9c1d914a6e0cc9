"""Codes of 4 and 6 bits in bytes, as ComfyUI's file format lays them out.

4 bits: byte j of a row holds column 2j in its low half and column 2j + 1 in its high half. 6 bits: the same bytes of
the low 4 bits, followed by K/4 bytes with the top 2 bits, column c in byte c // 4 at bit 2 (c mod 4).
"""

import torch


def row_bytes(columns: int, bits: int) -> int:
    """Return the bytes of a packed row.

    Raises:
        ValueError: bits other than 4 and 6, or columns that do not fill the bytes.
    """
    if bits not in (4, 6):
        raise ValueError(f"{bits} bits: codes of 4 or 6 bits can be packed")
    if columns % (2 if bits == 4 else 4):
        raise ValueError(f"{columns} columns of {bits} bits do not fill whole bytes")
    return columns * bits // 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return uint8 [N, K * bits / 8] of unsigned codes [N, K] (any integer dtype, values below 2^bits)."""
    row_bytes(codes.shape[-1], bits)
    codes = codes.to(torch.uint8).contiguous()
    # Two codes as one number of 16 bits (four as one of 32): shifts run over whole vectors, strided columns do not.
    pairs = codes.view(torch.int16) & 0x0F0F
    low = (pairs | (pairs >> 4)).to(torch.uint8)
    if bits == 4:
        return low
    fours = (codes >> 4).view(torch.int32)
    high = (fours | (fours >> 6) | (fours >> 12) | (fours >> 18)).to(torch.uint8)
    return torch.cat([low, high], 1)


def unpack(packed: torch.Tensor, columns: int, bits: int) -> torch.Tensor:
    """Return uint8 codes [N, columns] of packed uint8 or int8 rows.

    Raises:
        ValueError: a row has another number of bytes than ``columns`` codes take.
    """
    expected = row_bytes(columns, bits)
    if packed.shape[-1] != expected:
        raise ValueError(f"rows of {packed.shape[-1]} bytes; {columns} codes of {bits} bits take {expected}")
    packed = packed.view(torch.uint8)
    # Two codes as one number of 16 bits (four as one of 32), as in pack().
    pairs = packed[:, : columns // 2].to(torch.int16, memory_format=torch.contiguous_format)
    codes = ((pairs & 15) | ((pairs & 0xF0) << 4)).view(torch.uint8)
    if bits == 6:
        high = packed[:, columns // 2 :].to(torch.int32, memory_format=torch.contiguous_format)
        top = ((high & 3) << 4) | ((high & 0x0C) << 10) | ((high & 0x30) << 16) | ((high & 0xC0) << 22)
        codes |= top.view(torch.uint8)
    return codes
