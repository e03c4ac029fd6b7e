"""From files and hub names to micro-batches: `sources` reads rows, `chat` tokenises them, `cache`
keeps the result, `splits` checks the parts against each other, `batches` orders and collates."""
