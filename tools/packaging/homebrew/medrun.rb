# A formula for Homebrew. `make dist` writes the archive of the source and its SHA-256: put both here,
# with the address where you publish the archive, and `brew install --formula ./medrun.rb`.
class Medrun < Formula
  desc "Runs open medical language models on an ordinary CPU"
  url "file:///tmp/medrun-0.1.0.tar.gz"
  sha256 "0000000000000000000000000000000000000000000000000000000000000000"
  license "MIT"

  def install
    system "make", "install-programs", "PREFIX=#{prefix}"
  end

  test do
    answer = shell_output("#{bin}/medrun run -q #{share}/medrun/demo.mdr -p 'What are the symptoms of diabetes?'")
    assert_match "thirst", answer
  end
end
