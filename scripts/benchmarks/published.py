"""Figures that others have published, for simulations and for comparison."""

from __future__ import annotations

# Mean acceptance length by number of drafts, without thinking, of Qwen3.5-397B-A17B's own head on SPEED-Bench's coding
# prompts in vLLM (SemiAnalysisAI/InferenceX, golden_al_distribution). The default of simulated runs.
ACCEPTANCE_LENGTHS = {1: 1.92, 2: 2.70, 3: 3.33, 4: 3.83, 5: 4.20, 6: 4.48, 7: 4.73, 8: 4.71}

# llama.cpp TurboQuant fork before and after its fix, Qwen3.6-35B-A3B IQ4_NL, RTX 3090, one request
# (TheTom/llama-cpp-turboquant issue 147): (build, prompt tokens) -> drafts -> tokens/s of prefill and of decode.
LLAMA_CPP_FORK = {
    ("before", 1024): {0: (1461.19, 98.36), 2: (480.90, 115.37), 3: (471.46, 126.36), 4: (455.82, 143.21)},
    ("before", 8192): {0: (3277.07, 87.38), 2: (1568.59, 110.49), 3: (1626.07, 109.00), 4: (1671.36, 142.32)},
    ("before", 32768): {0: (2867.22, 61.33), 2: (1704.29, 100.82), 3: (1805.61, 119.21), 4: (1805.14, 128.24)},
    ("after", 1024): {0: (1288.02, 118.10), 2: (1190.01, 147.63), 3: (1145.07, 152.45), 4: (1277.92, 149.66)},
    ("after", 8192): {0: (3945.67, 104.42), 2: (3528.47, 148.37), 3: (3558.33, 157.01), 4: (3367.78, 156.47)},
    ("after", 32768): {0: (3452.69, 76.57), 2: (3065.30, 121.60), 3: (2942.63, 128.69), 4: (2922.91, 129.17)},
}
