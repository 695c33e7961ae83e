"""What is trained and tested on: cards, rows, questions, instructions, the base's own replies.

The rooms above and the front may import from here; this room imports config, machine, prompts.
"""

from bbkit.data.catalogue import (
    GENERATED as GENERATED,
)
from bbkit.data.catalogue import (
    card as card,
)
from bbkit.data.catalogue import (
    cards as cards,
)
from bbkit.data.catalogue import (
    checksums as checksums,
)
from bbkit.data.catalogue import (
    load as load,
)
from bbkit.data.catalogue import (
    path_of as path_of,
)
from bbkit.data.catalogue import (
    role as role,
)
from bbkit.data.catalogue import (
    there as there,
)
from bbkit.data.catalogue import (
    verify as verify,
)
from bbkit.data.own import (
    halved as halved,
)
from bbkit.data.own import (
    is_own as is_own,
)
from bbkit.data.own import (
    refuse_shared as refuse_shared,
)
