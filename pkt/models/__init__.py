"""Everything pkt knows about models of others: their names, files, tokenizers and shapes."""

from pkt.models.huggingface import (
    EXPERT_PARAMETERS as EXPERT_PARAMETERS,
)
from pkt.models.huggingface import (
    FUSED as FUSED,
)
from pkt.models.huggingface import (
    HEAD_COLUMNS as HEAD_COLUMNS,
)
from pkt.models.huggingface import (
    HEAD_ROWS as HEAD_ROWS,
)
from pkt.models.huggingface import (
    PEFT_EMBEDDINGS as PEFT_EMBEDDINGS,
)
from pkt.models.huggingface import (
    ROLES as ROLES,
)
from pkt.models.huggingface import (
    TESTED as TESTED,
)
from pkt.models.huggingface import (
    Kind as Kind,
)
from pkt.models.huggingface import (
    ModelSpec as ModelSpec,
)
from pkt.models.huggingface import (
    Runs as Runs,
)
from pkt.models.huggingface import (
    Target as Target,
)
from pkt.models.huggingface import (
    Weights as Weights,
)
from pkt.models.huggingface import (
    check_checkpoint as check_checkpoint,
)
from pkt.models.huggingface import (
    check_identity as check_identity,
)
from pkt.models.huggingface import (
    check_quantization as check_quantization,
)
from pkt.models.huggingface import (
    check_tokenizer as check_tokenizer,
)
from pkt.models.huggingface import (
    checked_device as checked_device,
)
from pkt.models.huggingface import (
    decoder_layers as decoder_layers,
)
from pkt.models.huggingface import (
    described as described,
)
from pkt.models.huggingface import (
    fingerprint as fingerprint,
)
from pkt.models.huggingface import (
    hollow_model as hollow_model,
)
from pkt.models.huggingface import (
    kind_of as kind_of,
)
from pkt.models.huggingface import (
    layer_of as layer_of,
)
from pkt.models.huggingface import (
    load_config as load_config,
)
from pkt.models.huggingface import (
    load_model as load_model,
)
from pkt.models.huggingface import (
    load_tokenizer as load_tokenizer,
)
from pkt.models.huggingface import (
    other_ids as other_ids,
)
from pkt.models.huggingface import (
    plain_head as plain_head,
)
from pkt.models.huggingface import (
    quiet as quiet,
)
from pkt.models.huggingface import (
    read_roles as read_roles,
)
from pkt.models.huggingface import (
    shared_vocabulary as shared_vocabulary,
)
from pkt.models.huggingface import (
    skeleton as skeleton,
)
from pkt.models.huggingface import (
    spec_of as spec_of,
)
from pkt.models.huggingface import (
    spec_of_model as spec_of_model,
)
from pkt.models.huggingface import (
    stored_names as stored_names,
)
from pkt.models.huggingface import (
    supported as supported,
)
from pkt.models.huggingface import (
    unwrap as unwrap,
)
from pkt.models.huggingface import (
    with_roles as with_roles,
)
