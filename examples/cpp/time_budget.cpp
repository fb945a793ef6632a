// Keeps as many visual tokens as a time budget allows, which no fixed method can: a pruner of the program's own decides
// where the bundle would, by the scores and by the time that is left until the first token is due.
//
//   time_budget BUNDLE PICTURE QUESTION MILLISECONDS [TIMES]
//
// BUNDLE is one of `edgeprune export … --method host`. The first answer keeps all tokens and shows what one costs.
#include <algorithm>
#include <cstdlib>
#include <edgeprune/edgeprune.hpp>
#include <iostream>
#include <string>
#include <vector>

class TimeBudget {
 public:
  explicit TimeBudget(double milliseconds) : budget_(milliseconds) {}

  std::vector<int64_t> choose(const edgeprune::SiteScores& site) {
    const auto tokens = static_cast<double>(site.scores.size());
    if (site.name != "site0") return site.highest(static_cast<int64_t>(tokens));  // decided already
    reached_ = site.elapsed_ms;
    kept_ = cost_ > 0 ? std::clamp((budget_ - reached_) / cost_, 1.0, tokens) : tokens;
    return site.highest(static_cast<int64_t>(kept_));
  }
  // What came behind the site is taken for proportional to the tokens that stayed.
  void learn(double first_token_ms) { cost_ = (first_token_ms - reached_) / kept_; }

 private:
  double budget_;
  double reached_ = 0, kept_ = 1;
  double cost_ = 0;  // milliseconds per token; 0 = not known yet
};

int main(int count, char** values) {
  if (count < 5) {
    std::cerr << "usage: time_budget BUNDLE PICTURE QUESTION MILLISECONDS [TIMES]\n";
    return 2;
  }
  try {
    TimeBudget budget(std::atof(values[4]));
    edgeprune::VisionSession::Settings settings;
    settings.pruner = [&](const edgeprune::SiteScores& site) { return budget.choose(site); };
    const edgeprune::VisionSession session(values[1], settings);
    std::vector<edgeprune::Image> images;
    images.push_back(edgeprune::Image::read(values[2]));
    for (int time = 0; time < (count > 5 ? std::atoi(values[5]) : 5); ++time) {
      const edgeprune::Reply reply = session.ask(images, values[3]);
      const edgeprune::Site site = reply.sites().at(0);
      budget.learn(reply.timing_ms("time_to_first_token"));
      std::cout << site.kept << " of " << site.tokens_in << " visual tokens, first token after "
                << reply.timing_ms("time_to_first_token") << " ms: " << reply.text() << std::endl;
    }
  } catch (const edgeprune::Exception& error) {
    std::cerr << "time_budget: " << error.what() << '\n';
    return 1;
  }
}
