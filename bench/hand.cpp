// The benchmark's hand-written C++: an adaptive Tsit5 solve per trajectory, steps kept for the reverse sweep, trajectories
// spread over threads. bench/rivals.py puts the tableau and the field where the names in capitals are, and compiles it.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>
#include <vector>

constexpr int N = STATES, P = ARGUMENTS, S = STAGES;
constexpr double A[S][S] = TABLEAU_A;
constexpr double B[S] = TABLEAU_B, E[S] = TABLEAU_E, C[S] = TABLEAU_C;

static inline void field(double t, const double* y, const double* p, double* f) { FIELD }
static inline void pull(double t, const double* y, const double* p, const double* c, double* cy, double* cp) { PULL }

struct Step { double t, h, y[N]; };

// Stages of a step from y; k[0] is given.
static inline void stages(double t, double h, const double* y, const double* p, double k[S][N], double u[S][N]) {
    for (int n = 0; n < N; ++n) u[0][n] = y[n];
    for (int i = 1; i < S; ++i) {
        for (int n = 0; n < N; ++n) {
            double sum = 0;
            for (int j = 0; j < i; ++j) sum += A[i][j] * k[j][n];
            u[i][n] = y[n] + h * sum;
        }
        field(t + C[i] * h, u[i], p, k[i]);
    }
}

// Integrates one trajectory; keeps its accepted steps if there is somewhere to keep them. Returns attempts.
static int solve(double t1, double rtol, double atol, double h, double* y, const double* p, std::vector<Step>* kept) {
    double t = 0, k[S][N], u[S][N];
    int attempts = 0;
    field(t, y, p, k[0]);
    while (t < t1 && attempts < MAX_STEPS) {
        h = std::min(h, t1 - t);
        stages(t, h, y, p, k, u);
        ++attempts;
        double sum = 0;  // the last stage is at the new state, whose slope is the next step's first
        for (int n = 0; n < N; ++n) {
            double error = 0;
            for (int i = 0; i < S; ++i) error += E[i] * k[i][n];
            double scaled = h * error / (atol + rtol * std::max(std::fabs(y[n]), std::fabs(u[S - 1][n])));
            sum += scaled * scaled;
        }
        double norm = std::sqrt(sum / N);
        double factor = norm == 0 ? 10.0 : std::min(10.0, std::max(0.2, 0.9 * std::pow(norm, -0.2)));
        if (norm < 1) {
            if (kept) {
                Step step{t, h, {}};
                std::copy(y, y + N, step.y);
                kept->push_back(step);
            }
            t = t1 - t <= h ? t1 : t + h;
            std::copy(u[S - 1], u[S - 1] + N, y);
            std::copy(k[S - 1], k[S - 1] + N, k[0]);
        }
        h *= factor;
    }
    return t < t1 ? -1 : attempts;
}

// The gradient of sum(y^2) at the end, step sizes held constant.
static void reverse(const std::vector<Step>& kept, const double* y, const double* p, double* gradient) {
    double cy[N];
    for (int n = 0; n < N; ++n) cy[n] = 2 * y[n];
    std::fill(gradient, gradient + P, 0.0);
    for (auto step = kept.rbegin(); step != kept.rend(); ++step) {
        double k[S][N], u[S][N], ck[S][N];
        field(step->t, step->y, p, k[0]);
        stages(step->t, step->h, step->y, p, k, u);
        for (int i = 0; i < S; ++i)
            for (int n = 0; n < N; ++n) ck[i][n] = step->h * B[i] * cy[n];
        for (int i = S - 1; i >= 0; --i) {
            double cu[N] = {};
            pull(step->t + C[i] * step->h, u[i], p, ck[i], cu, gradient);
            for (int n = 0; n < N; ++n) {
                cy[n] += cu[n];
                for (int j = 0; j < i; ++j) ck[j][n] += step->h * A[i][j] * cu[n];
            }
        }
    }
}

extern "C" void run(long trajectories, int threads, double t1, double rtol, double atol, double h0, const double* y0s,
                    const double* ps, double* ys, int* attempts, double* gradients) {
    std::atomic<long> next{0};
    auto work = [&] {
        std::vector<Step> kept;
        for (long begin; (begin = next.fetch_add(64)) < trajectories;)
            for (long i = begin; i < std::min(begin + 64, trajectories); ++i) {
                kept.clear();
                std::copy(y0s + i * N, y0s + (i + 1) * N, ys + i * N);
                attempts[i] = solve(t1, rtol, atol, h0, ys + i * N, ps + i * P, gradients ? &kept : nullptr);
                if (gradients) reverse(kept, ys + i * N, ps + i * P, gradients + i * P);
            }
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads && i * 64 < trajectories; ++i) others.emplace_back(work);
    work();
    for (auto& thread : others) thread.join();
}
