"Tests run offline, on one thread per process and without a display; set before torch or matplotlib is imported."
import os

for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(name, '1')
os.environ.update(HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', MPLBACKEND='agg', TOKENIZERS_PARALLELISM='false')
