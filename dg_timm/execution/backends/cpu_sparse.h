// Sparse execution on CPUs; cpu.c includes this once for each type of number.

// Sparse execution of a stage keeps, for its nodes in order: alpha[b, i, j], the weight of edge (i, j) for image b, 0
// where it is closed, and maps[i, b], where the map of node i of image b lies. Removed nodes have neither.

// The images with an open edge into a node; returns how many there are.
int64_t NAME(select_images)(int64_t *images, const SUM *alpha, int64_t batch, int64_t nodes, int64_t target) {
    int64_t count = 0;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t i = 0; i < target; i++)
            if (alpha[(b * nodes + i) * nodes + target] != 0) {
                images[count++] = b;
                break;
            }
    return count;
}

// What these images carry into a node: out (count, len).
void NAME(gather_inputs)(NUMBER *out, const NUMBER *const *maps, const SUM *alpha, const int64_t *images, int64_t count, int64_t batch, int64_t nodes, int64_t target, int64_t len, int threads) {
    int64_t pieces = (len + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < count * pieces; task++) {
        int64_t k = task / pieces, b = images[k], from = task % pieces * PIECE, size = len - from < PIECE ? len - from : PIECE;
        const NUMBER *x[nodes];
        SUM w[nodes];
        for (int64_t i = 0; i < target; i++) {
            x[i] = maps[i * batch + b];
            w[i] = alpha[(b * nodes + i) * nodes + target];
        }
        NAME(piece)(out + k * len + from, target, x, from, w, size);
    }
}

// The weight of an edge (Eqs. 4 and 5): *scale * sigmoid(<weight, mean> + bias), or 0 below the threshold; scale may be NULL.
static SUM NAME(edge)(const NUMBER *mean, const NUMBER *weight, NUMBER bias, const NUMBER *scale, double threshold, int64_t channels) {
    SUM dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t c = 0; c < channels; c++) dot += LOAD(mean[c]) * LOAD(weight[c]);
    SUM edge = (SUM)(1 / (1 + exp(-(double)(dot + LOAD(bias)))));
    if (scale) edge *= LOAD(*scale);
    return fabs((double)edge) < threshold ? 0 : edge;
}

// Of these images, those for which a node's gate is closed (<gate, pooled input> + gate_bias < 0) skip it: its edges
// become edges past it, alpha[i, k] += alpha[i, node] alpha[node, k]. pooled (batch, nodes, channels): of the nodes so
// far. Returns how many images stay selected, or -1 where there was no memory.
int64_t NAME(close_gates)(int64_t *images, SUM *alpha, const NUMBER *pooled, const NUMBER *gate, double gate_bias, const NUMBER *weight, const NUMBER *bias, const NUMBER *scale, const int64_t *targets, double threshold, int64_t node, int64_t count, int64_t nodes, int64_t channels, int64_t n) {
    int64_t kept = 0;
    NUMBER *mean = malloc(sizeof(NUMBER) * channels);
    SUM *sum = malloc(sizeof(SUM) * channels);
    if (!mean || !sum) kept = -1;
    for (int64_t k = 0; kept >= 0 && k < count; k++) {
        SUM *of_image = alpha + images[k] * nodes * nodes, dot = 0;
        memset(sum, 0, sizeof(SUM) * channels);
        for (int64_t i = 0; i < node; i++) {
            const NUMBER *source = pooled + (images[k] * nodes + i) * channels;
            SUM w = of_image[i * nodes + node];
            if (w != 0)
                for (int64_t c = 0; c < channels; c++) sum[c] += w * LOAD(source[c]);
        }
        for (int64_t c = 0; c < channels; c++) mean[c] = STORE(sum[c]);
#pragma omp simd reduction(+ : dot)
        for (int64_t c = 0; c < channels; c++) dot += LOAD(mean[c]) * LOAD(gate[c]);
        if (!((double)dot + gate_bias < 0)) {
            images[kept++] = images[k];
            continue;
        }
        for (int64_t j = 0; j < n; j++) {
            SUM edge = NAME(edge)(mean, weight + j * channels, bias[j], scale ? scale + j : NULL, threshold, channels);
            for (int64_t i = 0; i < node; i++) of_image[i * nodes + targets[j]] += of_image[i * nodes + node] * edge;
        }
        for (int64_t i = 0; i < node; i++) of_image[i * nodes + node] = 0;
    }
    free(mean);
    free(sum);
    return kept;
}

// A node has run for these images, x: (count, channels, size) or (count, size, channels). Its n edges, to `targets`, are
// weighed, and its means kept in pooled (batch, nodes, channels), which may be NULL. Without a weight nothing is weighed.
// Returns 0, or 1 where there was no memory for the means.
int NAME(finish_node)(const NUMBER **maps, SUM *alpha, NUMBER *pooled, const int64_t *images, const NUMBER *x, const NUMBER *weight, const NUMBER *bias, const NUMBER *scale, const int64_t *targets, double threshold, int64_t node, int64_t count, int64_t batch, int64_t nodes, int64_t channels, int64_t size, int64_t n, int channels_last, int threads) {
    for (int64_t k = 0; k < count; k++) maps[node * batch + images[k]] = x + k * channels * size;
    if (!weight) return 0;
    NUMBER *means = malloc(sizeof(NUMBER) * (count * channels + 1));
    if (!means) return 1;
    NAME(channel_means)(means, x, count, channels, size, channels_last, threads);
    for (int64_t k = 0; k < count; k++) {
        const NUMBER *mean = means + k * channels;
        if (pooled) memcpy(pooled + (images[k] * nodes + node) * channels, mean, sizeof(NUMBER) * channels);
        for (int64_t j = 0; j < n; j++)
            alpha[(images[k] * nodes + node) * nodes + targets[j]] =
                NAME(edge)(mean, weight + j * channels, bias[j], scale ? scale + j : NULL, threshold, channels);
    }
    free(means);
    return 0;
}
