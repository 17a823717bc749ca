"""Operations that torch has in pieces or has slower, and the launching of many at once."""
