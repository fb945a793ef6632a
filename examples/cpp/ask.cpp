// Asks one question about one picture and prints the answer as it comes: all that a program needs.
//
//   ask BUNDLE PICTURE QUESTION
#include <edgeprune/edgeprune.hpp>
#include <iostream>
#include <string>

int main(int count, char** values) {
  if (count != 4) {
    std::cerr << "usage: ask BUNDLE PICTURE QUESTION\n";
    return 2;
  }
  try {
    const edgeprune::VisionSession session(values[1]);
    std::vector<edgeprune::Image> images;
    images.push_back(edgeprune::Image::read(values[2]));

    edgeprune::Options options;
    options.max_new_tokens = 32;
    const edgeprune::Reply reply = session.ask(images, values[3], options, [](std::string_view piece) {
      std::cout << piece << std::flush;
      return true;  // false would end the answer here
    });
    std::cout << '\n';

    for (const edgeprune::Site& site : reply.sites()) {
      std::cerr << site.name << ": " << site.kept << " of " << site.tokens_in << " visual tokens kept\n";
    }
    std::cerr << "first token after " << reply.timing_ms("time_to_first_token") << " ms\n";
  } catch (const edgeprune::Exception& error) {
    std::cerr << "ask: " << error.what() << '\n';
    return 1;
  }
}
