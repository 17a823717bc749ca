"""Operations that torch has in pieces, or has slower, on the CPU."""
