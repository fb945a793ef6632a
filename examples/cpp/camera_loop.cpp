// Keeps one session and answers the same question about frame after frame, always the newest: frames that come while an
// answer is made are dropped. One line per answered frame.
//
//   camera_loop BUNDLE PICTURE QUESTION [FRAMES_PER_SECOND [FRAMES]]
//
// The picture stands for the camera: replace Camera with your own.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <edgeprune/edgeprune.hpp>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

using Clock = std::chrono::steady_clock;

struct Frame {
  int number;
  Clock::time_point taken;
  edgeprune::Image image;
};

// Room for one frame: a newer one takes the place of one that nobody has fetched.
class LatestFrame {
 public:
  void put(Frame frame) {
    const std::lock_guard<std::mutex> lock(mutex_);
    dropped_ += frame_.has_value() ? 1 : 0;
    frame_ = std::move(frame);
    changed_.notify_one();
  }
  void end() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ended_ = true;
    changed_.notify_one();
  }
  // Waits; nothing when there will be no more.
  std::optional<Frame> take(int& dropped) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return frame_.has_value() || ended_; });
    std::optional<Frame> frame = std::move(frame_);
    frame_.reset();
    dropped = dropped_;
    return frame;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<Frame> frame_;
  int dropped_ = 0;
  bool ended_ = false;
};

// Takes frames at a fixed rate on a thread of its own.
class Camera {
 public:
  Camera(LatestFrame& latest, std::string path, double rate, int frames)
      : thread_([&latest, path = std::move(path), rate, frames, this] {
          for (int number = 0; number < frames && !failed_; ++number) {
            try {
              latest.put({number, Clock::now(), edgeprune::Image::read(path)});
            } catch (const edgeprune::Exception& error) {
              std::fprintf(stderr, "camera_loop: %s\n", error.what());
              failed_ = true;
            }
            std::this_thread::sleep_for(std::chrono::duration<double>(1 / rate));
          }
          latest.end();
        }) {}
  ~Camera() { thread_.join(); }
  bool failed() const { return failed_; }

 private:
  std::atomic<bool> failed_{false};
  std::thread thread_;
};

int main(int count, char** values) {
  if (count < 4) {
    std::fputs("usage: camera_loop BUNDLE PICTURE QUESTION [FRAMES_PER_SECOND [FRAMES]]\n", stderr);
    return 2;
  }
  const double rate = count > 4 ? std::atof(values[4]) : 10;
  const int frames = count > 5 ? std::atoi(values[5]) : 50;
  if (!(rate > 0) || frames < 1) {
    std::fputs("camera_loop: the rate and the number of frames must be positive\n", stderr);
    return 2;
  }
  try {
    const edgeprune::VisionSession session(values[1]);
    edgeprune::Options options;
    options.max_new_tokens = 16;
    LatestFrame latest;
    const Camera camera(latest, values[2], rate, frames);
    int dropped = 0;
    while (std::optional<Frame> frame = latest.take(dropped)) {
      std::vector<edgeprune::Image> images;
      images.push_back(std::move(frame->image));
      const edgeprune::Reply reply = session.ask(images, values[3], options);
      const double age = std::chrono::duration<double, std::milli>(Clock::now() - frame->taken).count();
      std::printf("frame %d: first token %.1f ms, answer %.1f ms, since the frame %.1f ms, %d dropped so far:%s\n",
                  frame->number, reply.timing_ms("time_to_first_token"), reply.timing_ms("total"), age, dropped,
                  reply.text().c_str());
      std::fflush(stdout);
    }
    return camera.failed() ? 1 : 0;
  } catch (const edgeprune::Exception& error) {
    std::fprintf(stderr, "camera_loop: %s\n", error.what());
    return 1;
  }
}
